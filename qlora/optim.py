"""The optimizer over fp32 copies of the adapters, and the learning rate of each step.

A bf16 number has 8 significant bits: adding an update smaller than 1/512 of it changes nothing. AdamW
therefore steps fp32 master copies, and the bf16 parameters are rounded from them; small updates add up in
the master until the rounding sees them. fp32 adapters are their own masters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qlora.errors import InputError

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, as in the QLoRA paper's code


class MasterOptimizer:
    """AdamW on fp32 masters of (possibly bf16) parameters.

    Args:
        parameters: what trains; gradients are read from `.grad` in any dtype.
        make: builds a torch optimizer over the masters.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], make: Callable[[list[Tensor]], torch.optim.Optimizer]
    ) -> None:
        self.parameters = list(parameters)
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        self.inner = make(self.masters)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One AdamW update at this rate; parameters become their masters rounded."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
                master.grad = None

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments as named tensors, to be stored without pickle: `<index>.<name>`."""
        tensors = {f"{index}.master": master.detach() for index, master in enumerate(self.masters)}
        for index, state in self.inner.state_dict()["state"].items():
            tensors.update({f"{index}.{k}": torch.as_tensor(v) for k, v in state.items()})
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave.

        Raises:
            InputError: the masters' shapes or the kind of optimizer differ.
        """
        wrong = [
            f"{index}.master"
            for index, master in enumerate(self.masters)
            if f"{index}.master" not in tensors or tensors[f"{index}.master"].shape != master.shape
        ]
        if wrong:
            raise InputError(f"The stored optimizer state does not fit the adapter: {', '.join(wrong)} differ.")
        description = self.inner.state_dict()
        states: dict[int, dict[str, Tensor | int]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            if name == "master":
                self.masters[int(index)].copy_(tensor)
            else:
                # bitsandbytes counts its steps in a plain int, torch in a tensor.
                plain = name == "step" and not isinstance(self.inner, torch.optim.AdamW)
                states.setdefault(int(index), {})[name] = int(tensor) if plain else tensor.clone()
        self.inner.load_state_dict({"state": states, "param_groups": description["param_groups"]})
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)


def choose_optimizer(name: str, device: torch.device, say: Callable[[str], object] = lambda line: None) -> str:
    """Resolve "auto": paged where the driver can move optimizer pages to main memory, else fused adamw."""
    pages = device.type == "cuda"
    if name == "auto" and not pages:
        say(f"optimizer: fused adamw, since {device.type} has no pages to move (paged_adamw_32bit on CUDA)")
    if name != "auto":
        return name
    return "paged_adamw_32bit" if pages else "adamw"


def build_optimizer(parameters: Sequence[nn.Parameter], name: str, weight_decay: float = 0.0) -> MasterOptimizer:
    """AdamW of one kind over the adapters.

    Args:
        name: adamw (torch, fused), paged_adamw_32bit or paged_adamw_8bit (bitsandbytes; moments of tensors
            below 4,096 values stay in 32 bits). Off CUDA the paged ones run, unpaged.
    Raises:
        InputError: an unknown name.
    """
    if name == "adamw":
        return MasterOptimizer(
            parameters,
            lambda masters: torch.optim.AdamW(
                masters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True
            ),
        )
    if name in ("paged_adamw_32bit", "paged_adamw_8bit"):
        import bitsandbytes as bnb

        paged = parameters[0].is_cuda
        bits = 32 if name.endswith("32bit") else 8
        return MasterOptimizer(
            parameters,
            lambda masters: bnb.optim.AdamW(
                masters, 0.0, BETAS, EPS, weight_decay, optim_bits=bits, is_paged=paged
            ),
        )
    raise InputError(f"optim is {name!r}; choose adamw, paged_adamw_32bit or paged_adamw_8bit.")


def build_schedule(name: str, peak: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the optimizer step (counted from 0).

    Rises linearly to `peak` over the warm-up (step 0 already moves), then stays (constant) or falls to zero
    just after the last step (linear, cosine). No state: resuming at step k needs only k.
    """

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if name == "linear":
            return peak * max(0.0, 1 - progress)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return peak

    return learning_rate
