"""AdaLoRA (arXiv 2303.10512): adapters as triplets, of which training keeps the most important ones.

In a layer the update is P diag(E) Q: lora_B = P (O, R), lora_E = E (R, 1), lora_A = Q (R, I). Triplet i is column
i of P, E_i and row i of Q; E_i = 0 takes it out. P and Q are kept near orthogonality, so that E acts as singular
values, by a penalty beside the loss over the L adapted layers:

    penalty    0.5 / (2 L) * sum over layers of |P^T P - 1| + |Q Q^T - 1|                       equation 4
    gradients  of |P^T P - 1|:  2 P (P^T P - 1) / |P^T P - 1|,  and of Q the same, transposed

(|.| is the Frobenius norm. The sum is a mean, as in the authors' code and in PEFT; the paper sums the squares.)

After each update t = 1, 2, ..., for each entry w with gradient g:

    I = |w g|     S <- b S + (1 - b) I     U <- b U + (1 - b) |I - S|     b = 0.85               equations 8 to 10
    score of a triplet = S U of E_i + mean of S U over column i of P + mean of S U over row i of Q       equation 7

The triplets with the highest scores over all layers are kept, as many as the budget allows:

    t <= t_i                 all of them
    t_i < t < T - t_f        target + (start - target) (1 - (t - t_i) / (T - t_f - t_i))^3       equation 12
    T - t_f <= t             the target; the choice made at T - t_f is final

Until T - t_f a choice is made every `interval` updates; zeroed triplets may grow back before the next one.

I inputs, O outputs, R rank before training. The penalty's gradient is added after clipping; the logged loss and
gradient norm are those of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRAWeights
from qlora.lora.variant import PeftFields, Variant
from qlora.system.errors import InputError

ORTHOGONALITY, SMOOTHING = 0.5, 0.85
DEVIATION = 0.02  # of A and B as they start


@dataclass(frozen=True)
class BudgetSchedule:
    """Number of triplets kept after each update; symbols as in the module docstring."""

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
        """Whether the triplets to keep are chosen again after update `step`."""
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
    """Drop the triplets whose E is zero; also return which remain: `<layer>.lora_E` -> R flags.

    Before training every E is zero: nothing is dropped, and there are no flags.
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
    """Undo `pack_triplets`: dropped triplets come back as zeros.

    Args:
        rank_pattern: from `file`; None if nothing was dropped.
    Raises:
        InputError: the pattern does not fit the tensors.
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


class AdaLoRA(Variant):
    """Adds `lora_E` (R, 1) fp32, the singular values; A and B start Gaussian (its authors' code), E at zero.

    Its files omit the triplets that training has zeroed; rank_pattern says which.
    """

    flag, name = "use_adalora", "AdaLoRA"
    extras: ClassVar = {"lora_E": "lora_E"}
    peft_type, rank_field = "ADALORA", "init_r"
    run_fields = ("tinit", "tfinal", "total_step")

    def start(self, weights: LoRAWeights, layer: nn.Module, generator: torch.Generator) -> None:
        for parameter in (weights.lora_A, weights.lora_B):
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, DEVIATION, generator=generator))
        values = torch.zeros(weights.rank, 1, device=weights.lora_A.device)
        weights.register_parameter("lora_E", nn.Parameter(values))

    def effective_A(self, A: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        return ScaledRows.apply(A, extras["lora_E"].float())

    def shapes(self, rows: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_E": (rank, 1)}

    def misfit(self, rows: int, rank: int) -> str:
        return f"rank {rank} and not as many singular values in E"

    def used_rank(self, A: Tensor, extras: Mapping[str, Tensor]) -> int:
        return int(extras["lora_E"].count_nonzero())

    def file_name(self, key: str) -> str:
        return key.removesuffix(".weight") if ".lora_" in key else key

    def own_name(self, key: str) -> str:
        return f"{key}.weight" if key.endswith((".lora_A", ".lora_B")) else key

    def pack(
        self, state: dict[str, Tensor], config: LoRAConfig, run_fields: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        packed, pattern = pack_triplets(state)
        own = {
            "peft_type": self.peft_type,
            "r": 8,  # PEFT's default: it reads init_r
            "init_r": config.rank,
            "target_r": config.adalora_target_rank or max(1, config.rank // 2),
            **{"tinit": 0, "tfinal": 0, "total_step": 1},  # PEFT needs them to load an adapter
            **run_fields,
            "deltaT": config.adalora_interval,
            "beta1": SMOOTHING,
            "beta2": SMOOTHING,
            "orth_reg_weight": ORTHOGONALITY,
            "rank_pattern": pattern,
        }
        return packed, own

    def unpack(
        self, state: dict[str, Tensor], description: Mapping[str, Any], config: LoRAConfig, file: Path
    ) -> dict[str, Tensor]:
        return unpack_triplets(state, description.get("rank_pattern"), config.rank, file)

    def read(self, fields: PeftFields) -> dict[str, Any]:
        if fields.given("peft_type", None) != self.peft_type:
            return {}
        target, interval = fields.given("target_r", 0), fields.given("deltaT", 1)
        fields.check("target_r", "a whole number", type(target) is int and target >= 0)
        fields.check("deltaT", "a whole number of 1 or more", type(interval) is int and interval >= 1)
        return {
            "use_adalora": True,
            "adalora_target_rank": min(target, fields.given("init_r", 0)),
            "adalora_interval": interval,
            "rank_pattern": {},  # here it lists triplets
        }


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
