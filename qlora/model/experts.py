"""Mixture-of-experts layers with frozen experts, each matrix a separate weight.

transformers stacks the E experts of a layer into two parameters. A 4-bit weight is one matrix, and only the
matrices of chosen experts should be dequantized, so they are stored separately:

    gate_up_proj (E, 2 F, D), down_proj (E, D, F)   ->   E x {gate_proj, up_proj (F, D), down_proj (D, F)}

For a token x with its K best experts e and their weights p_e, both from the router:

    y = sum over e of p_e down_e (act(gate_e x) * up_e x)

Like any frozen layer here, the experts' matrices save no activation and get no gradient; x and p do. The router
stays transformers' own 16-bit layer. N tokens, D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.families import FAMILIES, family_of
from qlora.quant.layers import FrozenMatrix
from qlora.system.errors import InputError

MAX_EXPERTS = 2**16  # over all layers: more than twice today's largest


class Expert(nn.Module):
    """(n, D) -> (n, D): a gated MLP."""

    def __init__(self, hidden: int, width: int, activation: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = FrozenMatrix(width, hidden), FrozenMatrix(width, hidden)
        self.down_proj = FrozenMatrix(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """A layer's experts, with the call signature of transformers' own."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply each expert to its tokens and sum with the router's weights.

        Args:
            hidden_states: (N, D); top_k_index and top_k_weights: (N, K), the experts of each token.
        Returns:
            (N, D) in the dtype of hidden_states.
        """
        num_tokens, top_k = top_k_index.shape
        chosen = top_k_index.flatten()  # (N K,), a token's experts side by side
        by_expert = chosen.argsort(stable=True)
        counts = count_choices(chosen, len(self)).tolist()  # the one time that the host waits for the device
        inputs = hidden_states[by_expert // top_k].split(counts)
        outputs = torch.cat([expert(x) for expert, x in zip(self, inputs, strict=True) if len(x)])
        weighted = outputs[by_expert.argsort()] * top_k_weights.reshape(-1, 1)
        return weighted.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def count_choices(chosen: Tensor, num_experts: int) -> Tensor:
    """(E,) int64: how often each expert is in `chosen` (n,); on CUDA `bincount` would wait for the largest."""
    return chosen.new_zeros(num_experts).scatter_add(0, chosen, torch.ones_like(chosen))


def separate_experts(network: Any) -> None:
    """Replace the stacked experts of an empty transformers model by `Experts`, in place.

    Raises:
        InputError: the experts are not known to compute the formula above, or there are too many.
    """
    stacked = {
        name: module
        for name, module in network.named_modules()
        if any(p.dim() == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)
    }
    if stacked and not family_of(network.config).gated_experts:
        known = [kind for kind, family in FAMILIES.items() if family.gated_experts]
        raise InputError(
            f"A {network.config.model_type} model has layers of several stacked matrices; of mixtures of experts "
            f"{', '.join(known)} can be loaded."
        )
    total = sum(module.num_experts for module in stacked.values())
    if total > MAX_EXPERTS:
        raise InputError(f"The config describes {total} experts, more than {MAX_EXPERTS}; choose another model.")
    for name, module in stacked.items():
        count, hidden, width = module.down_proj.shape
        experts = Experts(Expert(hidden, width, module.act_fn) for _ in range(count))
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, experts)
