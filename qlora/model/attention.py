"""Causal attention over packed sequences, registered with transformers under one name.

A packed row holds S sequences end to end; sequence i occupies positions cu_seqlens[i] .. cu_seqlens[i + 1].
Attention must be causal within each sequence and must not cross sequences. An (N, N) mask would waste all but the
diagonal blocks, so each block is computed separately: on CUDA in half precision by one variable-length flash
kernel, otherwise by one scaled_dot_product_attention per sequence.

Without cu_seqlens this is transformers' own "sdpa", so a model with this attention still generates, pads and
caches like any other.

Gemma 2 caps its scores before the softmax, s -> c tanh(s / c), which no such kernel computes: its scores are
materialized, (heads, T, T) for one sequence at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION_NAME = "qlora_packed"
# Below this many tokens a CPU is faster (and more exact) in fp32 than in bf16: benchmarks/attention_dtype.py
UPCAST_BELOW = 256


def head_counts(config: Any) -> tuple[int, int, int]:
    """(heads, key-value heads, width of each) from a transformers config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def register_attention() -> None:
    """Make `attn_implementation="qlora_packed"` known to transformers; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def packed_arguments(cu_seqlens: Tensor, max_length: int) -> dict[str, Any]:
    """Keyword arguments of a model's forward that make its attention block-diagonal.

    The (1, 1, 1, 0) mask says "already prepared": transformers then builds none of its own.
    """
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_length,
        "max_length_k": max_length,
        "attention_mask": torch.empty(1, 1, 1, 0, dtype=torch.bool, device=cu_seqlens.device),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        query: (1, heads, N, head_dim); key and value: (1, kv_heads, N, head_dim).
        cu_seq_lens_q: (S + 1,) int32 boundaries; None falls back to ordinary attention.
        max_length_q: longest sequence.
        sliding_window: how many tokens back a token attends to (Mistral); None = all.
        softcap: largest magnitude c of a score (Gemma 2); None = no limit.
    Returns:
        (1, N, heads, head_dim), None; without cu_seq_lens_q the first dimension is the batch.
    Raises:
        ValueError: attention sinks, which are not supported.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("Attention with sinks (s_aux) is not supported; use a LLaMA-like model.")
    if cu_seq_lens_q is None and softcap is not None:
        capped = _softcapped_attention(query, key, value, attention_mask, dropout, scaling, softcap)
        return capped.transpose(1, 2), None
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert max_length_q is not None
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0 and softcap is None:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
        bounds, longest = cu_seq_lens_q, max_length_q
        output: Any = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=True
        )
        return output[None], None
    # split, not slices: its backward is one concatenation, a slice's is a full-size zero fill per sequence.
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        if q.shape[2] < UPCAST_BELOW and q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        mask = _window_mask(q.shape[2], sliding_window, query.device)
        if softcap is not None:
            outputs.append(_softcapped_attention(q, k, v, mask, dropout, scaling, softcap))
            continue
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat([output.to(query.dtype) for output in outputs], dim=2).transpose(1, 2), None


def _softcapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """softmax(c tanh(q k^T scaling / c) + mask) v, all scores materialized, the softmax in fp32.

    Args:
        query: (B, heads, T, head_dim); key and value: (B, kv_heads, T', head_dim).
        mask: (..., T, T') bool, true where a token attends; None = causal, ending at the last key.
    Returns:
        (B, heads, T, head_dim)
    """
    if mask is None:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(T, T) causal mask that reaches `window` tokens back; None if that equals plain causal."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
