"""GPTQ's inner loop on a CPU with a C compiler: a group of columns rounded one after another (csrc/gptq.c)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from qlora.kernels.compile import compile_c
from qlora.kernels.fused import check_fits

SOURCE = Path(__file__).parent / "csrc" / "gptq.c"


def round_group(weight: Tensor, scales: Tensor, U: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Round G columns with feedback among them.

    Args:
        weight: (G, O) fp32, the columns of a weight as rows; changed: the feedback goes into it.
        scales: (G, O) fp32, positive. A column o can be any of scales[:, o] * values.
        U: (G, G) fp32, upper triangular, its rows may lie apart.
        values: (16,) fp32, ascending.
    Returns:
        (codes (G, O) uint8, indices into `values`; errors (G, O) fp32, each divided by its U_jj);
        None if the kernel is not available.
    """
    library = compile_c(SOURCE) if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
    if library is None or U.stride(1) != 1:
        return None
    shape = group, outputs = weight.shape
    codes, errors = torch.empty(shape, dtype=torch.uint8), torch.empty(shape)
    check_fits(
        torch.float32,
        weight=(weight, shape),
        scales=(scales, shape),
        U=(U, (group, group)),
        values=(values, (16,)),
    )
    assert weight.is_contiguous() and scales.is_contiguous() and values.is_contiguous()
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, scales, U, values, codes, errors))
    library.round_group(*pointers, *map(ctypes.c_long, (group, outputs, U.stride(0))))
    return codes, errors
