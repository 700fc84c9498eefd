"""Attention over packed sequences on a CPU: forward and backward in one C call each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.fused import kernel

NO_SCRATCH = "out of memory in the attention kernel"


class PackedAttention(torch.autograd.Function):
    """Rotary embedding and causal attention over packed sequences, on a CPU; nothing but its inputs is kept.

    For one sequence and head, with R queries of a block, C keys that the last of them sees, d = head_dim, s the
    scaling and P the causal softmax by rows; sums and softmax are in fp32 whatever the tensors' dtype:

        forward    S = Q K^T               (R, C)       backward    dP = dO V^T                       (R, C)
                   P = softmax(s S)                                 dS = s P * (dP - rowsum(P * dP))
                   O = P V                 (R, d)                   dQ = dS K      dK = dS^T Q      dV = P^T dO

    P is computed again in the backward pass. Scores exist for a block of queries at a time, and what is above the
    diagonal is left out: half of the work of whole matrices. A processor that multiplies pairs of bf16 gets P and
    dS rounded to bf16 for bf16 tensors, as flash attention does; elsewhere they stay in fp32.

    Args:
        query: (N, heads d); key, value: (N, kv_heads d): before rotation. d a multiple of 16.
        cosine, sine: (N, d) in the query's dtype.
        bounds: (S + 1,) int32, where sequences begin and end.
        window: how many tokens back, itself included, a token sees.
    Raises:
        MemoryError: for a head of the longest sequence and its scores, which each thread holds.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cosine: Tensor,
        sine: Tensor,
        bounds: Tensor,
        head_dim: int,
        scaling: float,
        window: int,
    ) -> Tensor:
        run, out = kernel("attention", query), torch.empty_like(query)
        assert run is not None
        heads = (x.shape[1] // head_dim for x in (query, key))
        settings = scaling, len(bounds) - 1, *heads, head_dim, window
        if run(query, key, value, cosine, sine, bounds, out, *settings):
            raise MemoryError(NO_SCRATCH)
        ctx.save_for_backward(query, key, value, cosine, sine, bounds)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: under checkpointing each access computes the layer again
        gradients = [torch.empty_like(x) for x in saved[:3]]
        run = kernel("attention_backward", dout)
        assert run is not None
        if run(*saved, dout.contiguous(), *gradients, *ctx.settings):
            raise MemoryError(NO_SCRATCH)
        return *gradients, None, None, None, None, None, None
