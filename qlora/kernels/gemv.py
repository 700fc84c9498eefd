"""y = x W^T for the few rows x of a decoding step, computed from the frozen weight as stored.

Such a product takes as long as reading W. Dequantizing all of W for one row is tens of times slower, and a copy
in another layout costs memory and time. So on a CPU with a C compiler gemv.c reads the 4-bit codes or the bf16
weight in place; each weight equals the one used in training, and sums are in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.kernels.compile import compile_c

SOURCE = Path(__file__).parent / "csrc" / "gemv.c"
Product = Callable[[Tensor], Tensor]


class _Weight4bit(ctypes.Structure):
    """`struct weight` of gemv.c."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("scales8", ctypes.c_void_p),
        ("table8", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("offset", ctypes.c_float),
        ("block", ctypes.c_int),
        ("outer", ctypes.c_int),
        ("bf16", ctypes.c_int),
    ]


def product_4bit(codes: Tensor, state: Any, bias: Tensor | None, dtype: torch.dtype) -> Product | None:
    """x (..., columns) -> x W^T + b (..., rows), both in `dtype`, for a 4-bit W and its QuantState.

    None if the kernel is not available: not on a CPU, no compiler, or rows that are not a whole number of blocks.
    """
    rows, columns = state.shape
    library = compile_c(SOURCE) if codes.device.type == "cpu" else None
    sizes = (state.blocksize, state.state2.blocksize if state.nested else 1)
    if library is None or columns % state.blocksize or any(size & (size - 1) for size in sizes):
        return None
    outer = state.state2 if state.nested else state
    tensors = [codes, state.code, state.absmax if state.nested else None, outer.code, outer.absmax]
    blocks = rows * columns // state.blocksize
    sizes_of = [(codes, rows * columns // 2), (state.code, 16), (state.absmax, blocks)]
    if state.nested:
        sizes_of += [(outer.code, 256), (outer.absmax, -(-blocks // outer.blocksize))]
    if any(tensor.numel() != size for tensor, size in sizes_of):
        raise ValueError(f"A 4-bit weight does not fit its shape {tuple(state.shape)}.")
    weight = _Weight4bit(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        float(state.offset) if state.nested else 0.0,
        *(size.bit_length() - 1 for size in sizes),
        dtype == torch.bfloat16,
    )

    def product(x: Tensor, tensors: Any = tensors) -> Tensor:  # keeps the tensors alive as long as their addresses
        _check_width(x, columns)
        halves = x.reshape(-1, columns // 32, 16, 2).transpose(2, 3).float()
        return _call(library.linear_4bit, ctypes.byref(weight), x, halves, rows, bias)

    return product


def product_16bit(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The same for a W (rows, columns) in bf16."""
    library = compile_c(SOURCE) if weight.device.type == "cpu" else None
    rows, columns = weight.shape
    if library is None or weight.dtype != torch.bfloat16 or not weight.is_contiguous() or columns % 16:
        return None

    def product(x: Tensor) -> Tensor:
        _check_width(x, columns)
        return _call(library.linear_16bit, ctypes.c_void_p(weight.data_ptr()), x, x.float(), rows, bias)

    return product


def _check_width(x: Tensor, columns: int) -> None:
    if x.shape[-1] != columns:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {columns} columns.")


def _call(function: Any, weight: Any, x: Tensor, prepared: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    prepared, y = prepared.contiguous(), x.new_empty(*x.shape[:-1], rows, dtype=torch.float32)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (prepared, y))
    columns = x.shape[-1]
    function(weight, *pointers, *map(ctypes.c_long, (x.numel() // columns, rows, columns)))
    return (y if bias is None else y.add_(bias)).to(x.dtype)
