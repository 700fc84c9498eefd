"""Slow, obvious versions of what qlora computes fast. They share no code with it: only the published numbers.

Letters: N tokens, S sequences, V vocabulary, D hidden, H query heads, G key-value heads, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# QLoRA (arXiv 2305.14314), appendix E: the 16 quantiles of NF4.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' FP4: sign, 2 exponent bits, 1 mantissa bit; in the order of the bit patterns, largest is 1.
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": NF4, "fp4": FP4}


# ---- 4-bit weights ----------------------------------------------------------------------------------------


def dequantize_scales(state: Any) -> Tensor:
    """(blocks,) fp32: as stored, or value of an 8-bit code x the scale of its block of 256, + the mean."""
    if not state.nested:
        return state.absmax
    outer = state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    return state.state2.code[state.absmax.long()] * outer + state.offset


def dequantize(weight: Any) -> Tensor:
    """(out, in) fp32 weight of a Params4bit, one value after the other: first code in the high nibble."""
    state = weight.quant_state
    table = torch.tensor(TABLES[state.quant_type])
    codes = torch.stack([weight.data.flatten() // 16, weight.data.flatten() % 16], dim=1).flatten().long()
    values = table[codes[: math.prod(state.shape)]]
    block = torch.arange(values.numel()) // state.blocksize
    return (values * dequantize_scales(state)[block]).view(state.shape)


def dense_weight(layer: Any) -> Tensor:
    """(out, in) fp32 weight of a Linear4bit, nn.Linear or Conv1D (which stores the transpose)."""
    if hasattr(layer.weight, "quant_state"):
        return dequantize(layer.weight)
    transposed = type(layer).__name__ == "Conv1D"
    return (layer.weight.T if transposed else layer.weight).detach().float()


# ---- LoRA -------------------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """y = x W^T + b + s dropout(x) A^T B^T in the dtype of x, for autograd to differentiate."""
    update = F.linear(F.linear(F.dropout(x, dropout), lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + scaling * update


# ---- attention --------------------------------------------------------------------------------------------


def block_diagonal_mask(lengths: list[int], window: int | None = None) -> Tensor:
    """(N, N) bool, true where row i may look at column j: same sequence, not later, within the window."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(sum(lengths))
    distance = position[:, None] - position[None, :]
    mask = (sequence[:, None] == sequence[None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T s + mask) v, all scores written out; q (1, H, N, d), k, v (1, G, N, d) -> (1, N, H, d).

    With a soft cap c a score z is c tanh(z / c).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2)


# ---- loss -------------------------------------------------------------------------------------------------


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the supervised positions, from the full (N, V) logits in hidden's dtype."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)


# ---- comparing --------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in Frobenius norm, in fp64; a comparison with nothing is refused."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    size = expected.double().norm().item()
    assert size > 0, "the expected values are all zero: this compares with nothing"
    return (actual.double() - expected.double()).norm().item() / size
