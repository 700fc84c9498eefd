"""The optimizer over fp32 copies of the adapters.

A bf16 number has 8 significant bits: adding an update smaller than 1/512 of it changes nothing. AdamW
therefore steps fp32 master copies, and the bf16 parameters are rounded from them; small updates add up in
the master until the rounding sees them. fp32 adapters are their own masters. While it trains them, the
parameters' gradients are fp32 too (`grad_dtype`), so that accumulating micro-batches loses nothing.

`AdapterOptimizer` makes a torch optimizer of it, for loops other than ours.

LoRA+ (arXiv 2402.12354): B learns at a multiple of A's rate; with equal rates a wide layer does not learn features
efficiently (its section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from qlora.quant.library import bnb
from qlora.system.errors import InputError
from qlora.system.wording import list_first

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, as in the QLoRA paper's code
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def take_gradients(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Accumulate the parameters' gradients in `dtype`; None: in each parameter's own, as torch does."""
    for parameter in parameters:
        wanted = dtype or parameter.dtype
        if parameter.grad_dtype != wanted:
            grad, parameter.grad = parameter.grad, None
            parameter.grad_dtype = wanted
            parameter.grad = None if grad is None else grad.to(wanted)


class MasterOptimizer:
    """AdamW on fp32 masters of (possibly bf16) parameters.

    Args:
        parameters: to train; their gradients become fp32.
        make: builds a torch optimizer over groups of masters.
        fast: the `parameters` whose learning rate is `ratio` times the others'.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make: MakeOptimizer,
        fast: Collection[nn.Parameter] = (),
        ratio: float = 1.0,
    ) -> None:
        self.parameters = list(parameters)
        take_gradients(self.parameters, torch.float32)
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        chosen = {id(p) for p in fast}
        groups: dict[float, list[Tensor]] = {}  # ratio -> masters
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            groups.setdefault(ratio if id(parameter) in chosen else 1.0, []).append(master)
        self.inner = make([{"params": masters, "ratio": share} for share, masters in groups.items()])

    @torch.no_grad()
    def step(self, learning_rate: float | Sequence[float]) -> None:
        """Make one update; parameters become their rounded masters.

        Args:
            learning_rate: of all but the fast parameters; or a list with the rate of each group.
        """
        for index, group in enumerate(self.inner.param_groups):
            is_one = isinstance(learning_rate, (int, float))
            group["lr"] = learning_rate * group["ratio"] if is_one else learning_rate[index]  # type: ignore[operator, index]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        pairs = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
        for _, master in pairs:
            master.grad = None

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments as named tensors, to store without pickle: `<index>.<name>`."""
        tensors = {}
        for index, master in enumerate(self.masters):
            tensors[f"{index}.master"] = master.detach()
            for name, value in self.inner.state[master].items():
                if not name.startswith("qmap"):  # bitsandbytes' code table: a constant, shared by all
                    tensors[f"{index}.{name}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `state_tensors` into this optimizer's buffers (paged ones stay paged).

        Raises:
            InputError: lists every missing or extra tensor, or wrong shape or dtype (another adapter, or another
                kind of optimizer); nothing is restored.
        """
        if any(not key.endswith(".master") for key in tensors):  # saved after a first step
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            for group in self.inner.param_groups:
                group["lr"] = 0.0
            self.inner.step()  # an empty step, to create the buffers
            for master in self.masters:
                master.grad = None
        own = MasterOptimizer.state_tensors(self)
        wrong = sorted(own.keys() ^ tensors.keys())
        for key in own.keys() & tensors.keys():
            if (own[key].shape, own[key].dtype) != (tensors[key].shape, tensors[key].dtype):
                wrong.append(key)
        if wrong:
            some = list_first(wrong, 6, ", ")
            raise InputError(f"The stored optimizer state does not fit this adapter and optimizer: {some} differ.")
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            master.copy_(tensors[f"{index}.master"])
            if parameter is not master:
                parameter.copy_(master)
            state = self.inner.state[master]
            for name, value in state.items():
                if isinstance(value, Tensor) and not name.startswith("qmap"):
                    value.copy_(tensors[f"{index}.{name}"])
                elif name == "step":  # bitsandbytes counts in a plain int
                    state[name] = int(tensors[f"{index}.{name}"])


class LibraryAdamW(bnb.optim.AdamW):
    """bitsandbytes' AdamW; the host waits for the device once per step, not after every tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.initialized:
            self.to_gpu()
            self.initialized = True
        for index, group in enumerate(self.param_groups):
            for number, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, index, number)
                self.prefetch_state(p)
                self.update_step(group, p, index, number)
        if self.is_paged:  # from now on the host may read the pages
            torch.cuda.synchronize()


class AdapterOptimizer(torch.optim.Optimizer):
    """A `MasterOptimizer` as a torch optimizer: for schedulers, GradScaler, accelerate and loops of one's own.

    Its groups hold the model's parameters. A scheduler moves each group's `lr`; under LoRA+ there are two groups.

    Args:
        lr: learning rate; B's is the LoRA+ ratio times that.
    """

    is_complete = False

    def __init__(self, masters: MasterOptimizer, lr: float) -> None:
        if not isinstance(lr, Real) or not 0 <= lr < math.inf:
            raise InputError(f"lr is {lr!r:.80}; give a learning rate of 0 or more.")
        self.masters: MasterOptimizer = masters
        of_master = {id(m): p for p, m in zip(masters.parameters, masters.masters, strict=True)}
        groups: list[dict[str, Any]] = [
            {"params": [of_master[id(m)] for m in group["params"]], "lr": lr * group["ratio"]}
            for group in masters.inner.param_groups
        ]
        super().__init__(groups, {"lr": lr})
        self.is_complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: it has fp32 masters of that time's parameters only."""
        if self.is_complete:
            raise InputError(
                "This optimizer steps the parameters that trained when it was made; let the others train "
                "(requires_grad) before that, or give them an optimizer of their own."
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one update; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.masters.step([float(group["lr"]) for group in self.param_groups])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments as named tensors, and each group's settings without its parameters."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": self.masters.state_tensors(), "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`. Raises InputError: it is not this adapter's or optimizer's."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise InputError(
                f"The stored optimizer state has {len(groups)} groups of parameters, but this optimizer has "
                f"{len(self.param_groups)}; make it with the same lora_plus_ratio."
            )
        self.masters.load_state_tensors(state_dict["state"])
        for group, stored in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"})


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    name: str | MakeOptimizer,
    weight_decay: float = 0.0,
    lora_plus_ratio: float = 1.0,
    lora_B: Collection[nn.Parameter] = (),
) -> MasterOptimizer:
    """AdamW of one kind over the adapters.

    Args:
        name: adamw (torch, fused), paged_adamw_32bit or paged_adamw_8bit (bitsandbytes; moments of tensors
            below 4,096 values stay in 32 bits), off CUDA unpaged; or a function that builds any torch optimizer
            over groups of masters, such as torch.optim.SGD. It then sets weight decay itself.
        lora_plus_ratio: LoRA+'s ratio: learning rate of `lora_B` over that of the others.
    Raises:
        InputError: an unknown name.
    """
    return MasterOptimizer(parameters, adamw_kind(name, weight_decay), lora_B, lora_plus_ratio)


def adamw_kind(name: str | MakeOptimizer, weight_decay: float = 0.0) -> MakeOptimizer:
    """A function that builds AdamW of kind `name` over groups of masters. Raises InputError: an unknown name."""
    is_class = isinstance(name, type)
    if name is torch.optim.LBFGS or (is_class and not issubclass(name, torch.optim.Optimizer)):  # type: ignore[arg-type]
        raise InputError(f"kind is {name!r:.80}; give a torch optimizer whose step needs no closure.")
    if callable(name):
        return name
    if name == "adamw":
        return lambda groups: torch.optim.AdamW(
            groups, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True
        )
    if name in ("paged_adamw_32bit", "paged_adamw_8bit"):
        bits = 32 if name.endswith("32bit") else 8
        return lambda groups: LibraryAdamW(
            groups, 0.0, BETAS, EPS, weight_decay, optim_bits=bits, is_paged=groups[0]["params"][0].is_cuda
        )
    raise InputError(f"optim is {name!r}; choose adamw, paged_adamw_32bit or paged_adamw_8bit.")
