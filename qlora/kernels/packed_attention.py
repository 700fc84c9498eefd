"""Attention over packed sequences on a CPU: forward and backward in one C call each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.fused import check_fits, kernel

NO_SCRATCH = "out of memory in the attention kernel"


def check_bounds(bounds: Tensor, num_tokens: int, window: int) -> None:
    """Check what the kernel takes as indices; arguments and errors as `PackedAttention`."""
    if bounds.dtype != torch.int32 or bounds.dim() != 1 or window < 1:
        raise ValueError(f"bounds {tuple(bounds.shape)} in {bounds.dtype} or window {window}: int32, 1 or more.")
    ends = bounds.tolist()
    if ends[:1] != [0] or ends[-1] != num_tokens or len(ends) < 2 or ends != sorted(ends):
        raise IndexError(f"bounds {ends!s:.60} of sequences do not go from 0 up to {num_tokens} tokens.")


class PackedAttention(torch.autograd.Function):
    """Rotary embedding and causal attention over packed sequences on a CPU; saves only its inputs.

    For one sequence and head, with R queries in a block, C keys visible to the last of them, d = head_dim, s the
    scaling and P the causal softmax by rows; sums and softmax are in fp32 for every dtype:

        forward    S = Q K^T               (R, C)       backward    dP = dO V^T                       (R, C)
                   P = softmax(s S)                                 dS = s P * (dP - rowsum(P * dP))
                   O = P V                 (R, d)                   dQ = dS K      dK = dS^T Q      dV = P^T dO

    P is recomputed in the backward pass. Scores exist for one block of queries at a time, and those above the
    diagonal are skipped: half the work of whole matrices. For bf16 tensors on a processor with bf16 products, P
    and dS are rounded to bf16, as in flash attention; otherwise they stay in fp32.

    Args:
        query: (N, heads d); key, value: (N, kv_heads d), before rotation; d is a multiple of 16.
        cosine, sine: (N, d) in the query's dtype.
        bounds: (S + 1,) int32, start and end of each sequence.
        window: number of tokens, including itself, that a token sees.
    Raises:
        IndexError: bounds that are not 0 .. N in ascending order.
        ValueError: a tensor of another shape or dtype, or no window.
        MemoryError: no room for one head of the longest sequence and its scores per thread.
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
        check_bounds(bounds, len(query), window)
        shape = (
            key.shape if key.shape[1:] == value.shape[1:] and query.shape[1] % max(1, key.shape[1]) == 0 else ()
        )
        check_fits(query.dtype, key=(key, (len(query), *shape[1:])), value=(value, (len(query), *shape[1:])))
        check_fits(query.dtype, cosine=(cosine, (len(query), head_dim)), sine=(sine, (len(query), head_dim)))
        heads = (x.shape[1] // head_dim for x in (query, key))
        settings = scaling, len(bounds) - 1, *heads, head_dim, window
        if run(query, key, value, cosine, sine, bounds, out, *settings):
            raise MemoryError(NO_SCRATCH)
        ctx.save_for_backward(query, key, value, cosine, sine, bounds)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: with checkpointing each access recomputes the layer
        gradients = [torch.empty_like(x) for x in saved[:3]]
        run = kernel("attention_backward", dout)
        assert run is not None
        if run(*saved, dout.contiguous(), *gradients, *ctx.settings):
            raise MemoryError(NO_SCRATCH)
        return *gradients, None, None, None, None, None, None
