"""AdaLoRA (arXiv 2303.10512): adapters as triplets, of which training keeps the most important ones.

In a layer the update is P diag(E) Q: lora_B = P (O, R), lora_E = E (R, 1), lora_A = Q (R, I). Triplet i is column
i of P, E_i and row i of Q; E_i = 0 takes it out. P and Q are kept near orthogonality, so that E acts as singular
values, by a penalty beside the loss over the L adapted layers:

    penalty    0.5 / (2 L) * sum over layers of |P^T P - 1| + |Q Q^T - 1|                       equation 4
    gradients  of |P^T P - 1|:  2 P (P^T P - 1) / |P^T P - 1|,  and of Q the same, transposed

(|.| is the Frobenius norm, and the sum a mean: so in the authors' code and in PEFT; the paper squares and adds.)

After each update, with w and its gradient g entry by entry, t counted from 1:

    I = |w g|     S <- b S + (1 - b) I     U <- b U + (1 - b) |I - S|     b = 0.85               equations 8 to 10
    score of a triplet = S U of E_i + mean of S U over column i of P + mean of S U over row i of Q       equation 7

The triplets with the highest scores of all layers together are kept, as many as the budget says:

    t <= t_i                 all of them
    t_i < t < T - t_f        target + (start - target) (1 - (t - t_i) / (T - t_f - t_i))^3       equation 12
    T - t_f <= t             the target; which ones stays as it was decided at T - t_f

Until T - t_f a choice is made every `interval` updates, and what it zeroed may come back before the next one.

I inputs, O outputs, R rank before training. The penalty's gradient is added after clipping; the logged loss and
gradient norm are those of the data.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.injection import active_adapter, lora_layers, lora_parameters
from qlora.lora import LoRAWeights
from qlora.optim import MakeOptimizer, MasterOptimizer, adamw_kind, build_optimizer

ORTHOGONALITY, SMOOTHING = 0.5, 0.85
PREFIX = "adalora."  # of the names of its state


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets are kept after each update; letters as in the module docstring."""

    start: int  # triplets of all layers
    target: int
    t_i: int
    t_f: int
    interval: int
    total: int  # T

    def budget(self, step: int) -> int:
        """Triplets to keep after update `step`."""
        left = 1 - (step - self.t_i) / (self.total - self.t_f - self.t_i)
        return int((self.start - self.target) * min(1.0, max(0.0, left)) ** 3 + self.target)

    def chooses(self, step: int) -> bool:
        """Whether the kept triplets are chosen anew after update `step`."""
        last = self.total - self.t_f
        return step == last or (self.t_i < step < last and step % self.interval == 0)


def plan_budget(config: LoRAConfig, num_layers: int, total_steps: int) -> BudgetSchedule:
    """The schedule of a run; at least one update lies between t_i and T - t_f."""
    t_i = int(config.adalora_start * total_steps)
    last = max(t_i + 1, int(config.adalora_end * total_steps))
    target = config.adalora_target_rank or max(1, config.rank // 2)
    return BudgetSchedule(
        config.rank * num_layers,
        target * num_layers,
        t_i,
        total_steps - last,
        config.adalora_interval,
        total_steps,
    )


class AdaLoRAOptimizer(MasterOptimizer):
    """AdamW over triplets: adds the penalty's gradient, updates, scores, and zeroes what the budget does not hold.

    Every rank has the same gradients when it steps, and so makes the same choices.

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
            assert layer.lora_E is not None
            parts = {"A": layer.lora_A, "B": layer.lora_B, "E": layer.lora_E}
            self.layers.append({part: (p, masters[id(p)]) for part, p in parts.items()})
        self.sensitivity = [{part: torch.zeros_like(m) for part, (_, m) in layer.items()} for layer in self.layers]
        self.uncertainty = [{part: torch.zeros_like(m) for part, (_, m) in layer.items()} for layer in self.layers]
        self.kept = [torch.ones_like(layer["E"][1][:, 0], dtype=torch.bool) for layer in self.layers]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
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
                rows = master if part == "A" else master.T  # (R, ...), to be orthonormal
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
        """(R,) of every layer: the importance of its triplets."""
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
        """As the parent's, with the importance of every triplet and the choice among them."""
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
    model: nn.Module, config: LoRAConfig, name: str, weight_decay: float, total_steps: int
) -> MasterOptimizer:
    """The optimizer that the active adapter of `model` wants: LoRA+'s rates, AdaLoRA's choices, or plain AdamW.

    Args:
        name: the kind of AdamW, as in `build_optimizer`.
        total_steps: updates of the whole run, which AdaLoRA plans.
    """
    parameters, layers = lora_parameters(model), [layer.weights for layer in lora_layers(model).values()]
    fast = [layer.lora_B for layer in layers]
    adapter = active_adapter(model)
    if not config.use_adalora:
        return build_optimizer(parameters, name, weight_decay, config.lora_plus_ratio, fast)
    schedule = plan_budget(config, len(layers), total_steps)
    if adapter is not None:
        adapter.budget = (schedule.t_i, schedule.t_f, schedule.total)
    make = adamw_kind(name, weight_decay)
    return AdaLoRAOptimizer(parameters, make, layers, schedule, fast, config.lora_plus_ratio)


# ---- PEFT's files -----------------------------------------------------------------------------------------


def describe_adalora(
    config: LoRAConfig, rank_pattern: dict[str, list[bool]] | None, budget: tuple[int, int, int]
) -> dict[str, Any]:
    """What an AdaLoRA adapter's adapter_config.json says otherwise than that of LoRA.

    Args:
        budget: t_i, t_f and T of the run; PEFT wants them to load an adapter.
    """
    t_i, t_f, total = budget
    return {
        "peft_type": "ADALORA",
        "r": 8,  # PEFT's default: it reads init_r
        "init_r": config.rank,
        "target_r": config.adalora_target_rank or max(1, config.rank // 2),
        "tinit": t_i,
        "tfinal": t_f,
        "total_step": total,
        "deltaT": config.adalora_interval,
        "beta1": SMOOTHING,
        "beta2": SMOOTHING,
        "orth_reg_weight": ORTHOGONALITY,
        "rank_pattern": rank_pattern,
    }


def pack_triplets(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[bool]] | None]:
    """A state without the triplets whose E is zero, and which it still holds: `<layer>.lora_E` -> R flags.

    Before training every E is zero; then nothing is left out, and there are no flags.
    """
    kept = {key: (E != 0).flatten() for key, E in state.items() if key.endswith(".lora_E")}
    if all(flags.all() for flags in kept.values()) or not any(flags.any() for flags in kept.values()):
        return state, None
    packed = dict(state)
    for key, flags in kept.items():
        layer = key.removesuffix(".lora_E")
        packed[key] = state[key][flags]
        packed[f"{layer}.lora_A.weight"] = state[f"{layer}.lora_A.weight"][flags]
        packed[f"{layer}.lora_B.weight"] = state[f"{layer}.lora_B.weight"][:, flags].contiguous()
    return packed, {key: flags.tolist() for key, flags in kept.items()}


def unpack_triplets(state: dict[str, Tensor], rank_pattern: Any, rank: int, file: Path) -> dict[str, Tensor]:
    """The inverse: triplets that were left out are zero.

    Args:
        rank_pattern: out of `file`; None where nothing was left out.
    Raises:
        InputError: a pattern that does not fit the tensors.
    """
    if rank_pattern is None:
        return state
    problem = f"{file} has a rank_pattern that does not fit its tensors; save the adapter again."
    if not isinstance(rank_pattern, dict):
        raise InputError(problem)
    state = dict(state)
    for key, flags in rank_pattern.items():
        layer = str(key).removesuffix(".lora_E")
        names = {
            f"{layer}.lora_A.weight": 0,
            f"{layer}.lora_E": 0,
            f"{layer}.lora_B.weight": 1,
        }  # -> the triplets' axis
        is_mask = isinstance(flags, list) and len(flags) == rank and all(type(flag) is bool for flag in flags)
        if not is_mask or any(n not in state or state[n].dim() != 2 for n in names):
            raise InputError(problem)
        places = torch.tensor(flags).nonzero().flatten()
        for name, axis in names.items():
            tensor = state[name]
            if tensor.shape[axis] != len(places):
                raise InputError(problem)
            shape = [rank if i == axis else size for i, size in enumerate(tensor.shape)]
            state[name] = tensor.new_zeros(shape).index_copy_(axis, places, tensor)
    return state
