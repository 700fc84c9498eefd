"""Convert between the two orders of q's and k's rows, for rotary embeddings that pair them differently.

With d outputs per head, Hugging Face rotates (i, i + d/2) together: "halves". Meta, torchtune and llama.cpp's
llama architecture rotate neighbors (2i, 2i + 1): "interleaved".
"""

from __future__ import annotations

from torch import Tensor


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads x d, ...) of q or k, from halves to interleaved."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads x d, ...) of q or k, from interleaved to halves: the inverse of `interleave`.

    Raises:
        RuntimeError: the rows do not divide into heads of pairs.
    """
    return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
