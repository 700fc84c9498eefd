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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.config.lora import LoRAConfig
from qlora.system.errors import InputError

ORTHOGONALITY, SMOOTHING = 0.5, 0.85


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


class ScaledRows(torch.autograd.Function):
    """E * A in fp32 for A (R, I) in any dtype and E (R, 1); in fp32 too dA = E * dy, dE = sum over I of A * dy."""

    @staticmethod
    def forward(ctx: Any, lora_A: Tensor, lora_E: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(lora_A, lora_E)
        return lora_A.float() * lora_E

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lora_A, lora_E = ctx.saved_tensors
        return lora_E * dy, (lora_A.float() * dy).sum(1, keepdim=True)
