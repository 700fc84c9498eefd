"""x W^T and x W for the many rows x of a training step, computed from the frozen weight as stored.

Dequantizing W first would write and read 2 or 4 bytes per half-byte weight, and torch would then copy them into
the layout of its product. gemm.c decodes a panel of W into the processor's cache, in the layout that it
multiplies. Each weight equals the dequantized one to the last bit; sums are in fp32, and a row's result does not
depend on the other rows.

Requires a CPU with AVX-512 and GCC; for bf16 also AVX512-BF16 and no AMX, for which torch has faster products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.kernels.compile import compile_c
from qlora.kernels.fused import check_fits

SOURCE = Path(__file__).parent / "csrc" / "gemm.c"
WIDTH = 32  # columns of W decoded at a time


class _Weight(ctypes.Structure):
    """`struct weight` of gemm.c."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
        ("block", ctypes.c_long),
    ]


def library(x: Tensor) -> ctypes.CDLL | None:
    """gemm.c compiled for tensors like `x`; None if not possible or not faster."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    return compile_c(SOURCE, *(["-DBF16"] if x.dtype == torch.bfloat16 else []))


def multiply_4bit(
    x: Tensor, codes: Tensor, scales: Callable[[Any], Tensor], state: Any, bias: Tensor | None, backward: bool
) -> Tensor | None:
    """x W^T + b, (N, columns) -> (N, rows), or backward x W, (N, rows) -> (N, columns).

    Args:
        x: bf16 or fp32; b (rows,) in its dtype, or None.
        codes: the codes of W, two per byte.
        scales: computes (blocks,) fp32 from a QuantState.
        state: W's QuantState; table, block size and shape are read.
    Returns:
        None if the kernel is not available.
    """
    rows, columns = state.shape
    size = state.blocksize
    if library(x) is None or columns % size or size & (size - 1):  # a row must be a whole number of blocks
        return None
    every = scales(state).contiguous()
    if 2 * codes.numel() != rows * columns or every.numel() * size != rows * columns:
        raise ValueError(
            f"A weight of {codes.numel()} bytes and {every.numel()} scales does not fit {state.shape}."
        )
    weight = _Weight(
        codes.data_ptr(), None, every.data_ptr(), state.code.data_ptr(), rows, columns, size.bit_length() - 1
    )
    return _multiply(x, weight, bias, backward)


def multiply_16bit(
    x: Tensor, dense: Tensor, bias: Tensor | None, backward: bool, out: Tensor | None = None
) -> Tensor | None:
    """The same for a W (rows, columns) in bf16; `out` receives the product."""
    if library(x) is None or dense.dtype != torch.bfloat16 or not dense.is_contiguous():
        return None
    return _multiply(x, _Weight(None, dense.data_ptr(), None, None, *dense.shape, 0), bias, backward, out)


def _multiply(
    x: Tensor, weight: _Weight, bias: Tensor | None, backward: bool, out: Tensor | None = None
) -> Tensor | None:
    compiled = library(x)
    inner, outer = (weight.rows, weight.columns) if backward else (weight.columns, weight.rows)
    if compiled is None or weight.columns % WIDTH or inner * x.itemsize % 4:
        return None
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    out = x.new_empty(len(x), outer) if out is None else out
    assert out.is_contiguous()
    check_fits(x.dtype, x=(x, (len(out), inner)), out=(out, (len(x), outer)), bias=(bias, (outer,)))
    pointers = (None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, bias, out))
    if compiled.product(ctypes.byref(weight), *pointers, ctypes.c_long(len(x)), ctypes.c_long(backward)):
        raise MemoryError("out of memory in a product with a frozen weight")
    return out
