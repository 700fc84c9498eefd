"""AdaLoRA's optimizer: scores each triplet and keeps as many as the budget allows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.adalora import ORTHOGONALITY, SMOOTHING, BudgetSchedule, plan_budget
from qlora.lora.adapter import active_adapter, lora_layers
from qlora.lora.layer import LoRAWeights
from qlora.lora.optimizer import AdapterOptimizer, MakeOptimizer, MasterOptimizer, adamw_kind, build_optimizer
from qlora.lora.trainable import base_parameters, lora_parameters
from qlora.system.errors import InputError

PREFIX = "adalora."  # of its state's names


class AdaLoRAOptimizer(MasterOptimizer):
    """AdamW over triplets: adds the penalty's gradient, updates, scores, and zeroes triplets beyond the budget.

    Every rank steps with the same gradients and so makes the same choices.

    Args:
        layers: the adapted layers' weights, in a fixed order.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make: MakeOptimizer,
        layers: Sequence[LoRAWeights],
        schedule: BudgetSchedule,
        fast: Collection[nn.Parameter] = (),
        ratio: float = 1.0,
    ) -> None:
        super().__init__(parameters, make, fast, ratio)
        self.schedule, self.steps = schedule, 0
        masters = {id(p): master for p, master in zip(self.parameters, self.masters, strict=True)}
        # (parameter with the gradient, its fp32 master) of A, B and E of every layer
        self.layers: list[dict[str, tuple[Tensor, Tensor]]] = []
        for layer in layers:
            parts = {"A": layer.lora_A, "B": layer.lora_B, "E": layer.extras["lora_E"]}
            self.layers.append({part: (p, masters[id(p)]) for part, p in parts.items()})
        self.sensitivity = [{part: torch.zeros_like(m) for part, (_, m) in layer.items()} for layer in self.layers]
        self.uncertainty = [{part: torch.zeros_like(m) for part, (_, m) in layer.items()} for layer in self.layers]
        self.kept = [torch.ones_like(layer["E"][1][:, 0], dtype=torch.bool) for layer in self.layers]

    @torch.no_grad()
    def step(self, learning_rate: float | Sequence[float]) -> None:
        self._add_penalty()
        super().step(learning_rate)
        self.steps += 1
        last = self.schedule.total - self.schedule.t_f
        if self.steps < last:
            self._score()
        if self.schedule.chooses(self.steps):
            self._choose(self.schedule.budget(self.steps))
        if self.schedule.chooses(self.steps) or self.steps > last:
            for layer, kept in zip(self.layers, self.kept, strict=True):
                layer["E"][1].masked_fill_(~kept[:, None], 0.0)
                layer["E"][0].copy_(layer["E"][1])

    def _add_penalty(self) -> None:
        for layer in self.layers:
            for part in "AB":
                parameter, master = layer[part]
                rows = master if part == "A" else master.T  # (R, ...), should be orthonormal
                excess = rows @ rows.T
                excess.diagonal().sub_(1.0)
                size = excess.norm().clamp_min(torch.finfo(torch.float32).tiny)
                gradient = excess @ rows * (2 * ORTHOGONALITY / (2 * len(self.layers)) / size)
                gradient = gradient if part == "A" else gradient.T
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _score(self) -> None:
        for layer, sensitivity, uncertainty in zip(self.layers, self.sensitivity, self.uncertainty, strict=True):
            for part, (parameter, master) in layer.items():
                importance = (
                    torch.zeros_like(master) if parameter.grad is None else (master * parameter.grad).abs()
                )
                S, U = sensitivity[part], uncertainty[part]
                S.mul_(SMOOTHING).add_(importance, alpha=1 - SMOOTHING)
                U.mul_(SMOOTHING).add_((importance - S).abs(), alpha=1 - SMOOTHING)

    def scores(self) -> list[Tensor]:
        """(R,) per layer: the importance of its triplets."""
        result = []
        for S, U in zip(self.sensitivity, self.uncertainty, strict=True):
            parts = {part: S[part] * U[part] for part in S}
            result.append(parts["E"][:, 0] + (parts["A"].mean(1) + parts["B"].mean(0)))
        return result

    def _choose(self, budget: int) -> None:
        scores = self.scores()
        surplus = self.schedule.start - budget
        if surplus > 0:
            threshold = torch.cat(scores).kthvalue(surplus).values
            for kept, score in zip(self.kept, scores, strict=True):
                kept.copy_(score > threshold)

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), **self._own_tensors(), f"{PREFIX}steps": torch.tensor(self.steps)}

    def _own_tensors(self) -> dict[str, Tensor]:
        """The tensors that `step` changes in place."""
        tensors = {f"{PREFIX}{index}.kept": kept for index, kept in enumerate(self.kept)}
        for name, averages in (("sensitivity", self.sensitivity), ("uncertainty", self.uncertainty)):
            tensors |= {
                f"{PREFIX}{i}.{part}.{name}": t for i, layer in enumerate(averages) for part, t in layer.items()
            }
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the parent's state, the importance of every triplet, and which are kept."""
        theirs = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
        own = {**self._own_tensors(), f"{PREFIX}steps": torch.tensor(self.steps)}
        wrong = sorted(own.keys() ^ theirs.keys())
        wrong += [key for key in own.keys() & theirs.keys() if own[key].shape != theirs[key].shape]
        if wrong:
            raise InputError(f"The stored optimizer state is not AdaLoRA's of this adapter: {wrong[0]} differs.")
        super().load_state_tensors({key: tensor for key, tensor in tensors.items() if key not in theirs})
        for key, tensor in self._own_tensors().items():
            tensor.copy_(theirs[key])
        self.steps = int(theirs[f"{PREFIX}steps"])


def build_adapter_optimizer(
    model: nn.Module, config: LoRAConfig, name: str | MakeOptimizer, weight_decay: float, total_steps: int
) -> MasterOptimizer:
    """The optimizer for the active adapter of `model`: with LoRA+'s rates, AdaLoRA's choices, or plain AdamW.

    An unfrozen base trains, too.

    Args:
        name: as in `build_optimizer`.
        total_steps: updates of the whole run, for AdaLoRA's schedule.
    """
    parameters, layers = lora_parameters(model), [layer.weights for layer in lora_layers(model).values()]
    parameters += [parameter for parameter in base_parameters(model) if parameter.requires_grad]
    fast = [layer.lora_B for layer in layers]
    adapter = active_adapter(model)
    if not config.use_adalora:
        return build_optimizer(parameters, name, weight_decay, config.lora_plus_ratio, fast)
    schedule = plan_budget(config, len(layers), total_steps)
    if adapter is not None:
        adapter.run_fields = {"tinit": schedule.t_i, "tfinal": schedule.t_f, "total_step": schedule.total}
    make = adamw_kind(name, weight_decay)
    return AdaLoRAOptimizer(parameters, make, layers, schedule, fast, config.lora_plus_ratio)


def optimizer_for(
    model: nn.Module,
    lr: float,
    kind: str | MakeOptimizer = "adamw",
    weight_decay: float = 0.0,
    total_steps: int | None = None,
) -> AdapterOptimizer:
    """A torch optimizer with fp32 masters over all that trains in `model`, with its adapter's LoRA+ and AdaLoRA.

    Args:
        kind: adamw, paged_adamw_32bit, paged_adamw_8bit, or a class or function that builds any torch optimizer
            over parameter groups: torch.optim.SGD, functools.partial(torch.optim.RMSprop, momentum=0.9), ...
        total_steps: optimizer steps of the whole training; only AdaLoRA's schedule needs it.
    Raises:
        InputError: no adapter is active, an unknown kind, or AdaLoRA without total_steps.
    """
    adapter = active_adapter(model)
    if adapter is None:
        raise InputError("No adapter is active; call set_adapter(name) first.")
    if not isinstance(weight_decay, Real) or not 0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay is {weight_decay!r:.80}; give a number of 0 or more.")
    if weight_decay and callable(kind):
        raise InputError("weight_decay is for AdamW; set another optimizer's by functools.partial(kind, ...).")
    if adapter.config.use_adalora and not (type(total_steps) is int and total_steps > 0):
        raise InputError(
            f"total_steps is {total_steps!r:.20}; give AdaLoRA's schedule the number of optimizer steps."
        )
    masters = build_adapter_optimizer(model, adapter.config, kind, weight_decay, total_steps or 0)
    return AdapterOptimizer(masters, lr)
