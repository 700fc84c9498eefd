"""4-bit quantization of one weight: the only file that knows bitsandbytes' 4-bit internals.

Block-wise quantization (QLoRA, arXiv 2305.14314, section 3). A weight W (out, in) is flattened and cut
into blocks of 64. Each block stores one scale and 64 four-bit codes:

    absmax = max |W_block|         code = argmin_c |W_block / absmax - table[c]|
    W_hat  = table[code] * absmax

`table` holds 16 values in [-1, 1]: for NF4 the quantiles of a normal distribution, for FP4 a tiny float.
Two codes share a byte, the first in the high nibble. Double quantization stores the fp32 scales
themselves in 8 bits (blocks of 256, minus their mean): 4.127 bits per weight in all instead of 4.5.

A frozen linear layer computes y = x W_hat^T + b and, since W_hat never trains, only dx = dy W_hat.
Neither needs its input, so `FrozenLinear` saves no activation: it keeps the layer and dequantizes twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from qlora.quant.library import (
    Params4bit,
    QuantState,
    dequantize_blockwise,
    get_4bit_type,
    quantize_blockwise,
    wrap_codes,
)
from qlora.quant.parts import PartState
from qlora.system.errors import InputError

BLOCK_SIZES = (64, 128, 256, 512, 1024)
PIECE = 1 << 20  # weights quantized at once on a CPU: a multiple of every block size


@dataclass(frozen=True)
class QuantConfig:
    """How the base is quantized. Part of the cache key: two configs never share a cached model."""

    quant_type: str = "nf4"  # "nf4" or "fp4"
    double_quant: bool = True  # quantize the fp32 block scales to 8 bits as well
    block_size: int = 64  # weights that share one scale
    # Digest of the texts that the codes were chosen on (model/calibrate.py); "" = the nearest codes.
    calibration: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.calibration, str) or not re.fullmatch("[0-9a-f]{0,64}", self.calibration):
            raise InputError(f"calibration is {self.calibration!r:.60}; it should be hexadecimal digits.")
        if self.quant_type not in ("nf4", "fp4"):
            raise InputError(f"quant_type is {self.quant_type!r:.60}; choose nf4 or fp4.")
        if type(self.double_quant) is not bool:
            raise InputError(f"double_quant is {self.double_quant!r:.60}; give true or false.")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise InputError(f"block_size is {self.block_size!r:.60}; choose one of {BLOCK_SIZES}.")


def quantize_weight(weight: Tensor, config: QuantConfig) -> Params4bit:
    """Quantize one weight on its device, with the same bits as bitsandbytes' `quantize_4bit`.

    Blocks are independent, so a CPU weight is quantized in cache-sized pieces: 3 times as fast as one call, and
    without its temporaries (ten bytes per weight).

    Args:
        weight: (out, in) bf16, fp16 or fp32; freed by the caller afterwards.
    Returns:
        (out * in / 2, 1) uint8 with its `quant_state` (scales, table, logical shape).
    """
    codes, scales = quantize_blocks(weight.reshape(-1), config)
    state = QuantState(
        absmax=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=config.block_size,
        code=get_4bit_type(config.quant_type, device=weight.device),
        quant_type=config.quant_type,
    )
    if config.double_quant:
        state.offset, state.absmax, state.state2 = quantize_scales(scales)
        state.nested = True
    return wrap_codes(codes, state)


def quantize_blocks(flat: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """(codes (n / 2, 1) uint8, scales (blocks,) fp32) of a flat weight, or of whole blocks of one."""
    op, device = torch.ops.bitsandbytes.quantize_4bit.default, flat.device
    if device.type != "cpu":
        codes, scales = op(flat, config.block_size, config.quant_type, torch.uint8)
        return codes, scales
    codes = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // config.block_size))
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        some, few = op(piece, config.block_size, config.quant_type, torch.uint8)
        codes[start // 2 : start // 2 + len(some)] = some
        scales[start // config.block_size :][: len(few)] = few
    return codes, scales


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    """(mean, 8-bit scales minus the mean, their quantization state) of all scales of a weight."""
    offset = scales.mean()
    # bitsandbytes would reuse the table of its first call, even one on the meta device.
    table = torch.empty(256, device="meta") if scales.is_meta else None
    return offset, *quantize_blockwise(scales - offset, table, blocksize=256)


def with_scales(weight: Params4bit, scales: Tensor) -> Params4bit:
    """The same codes with other scales of the blocks, (blocks,) fp32, quantized if the weight's own are."""
    state = copy(weight.quant_state)
    if state.nested:
        state.offset, state.absmax, state.state2 = quantize_scales(scales)
    else:
        state.absmax = scales
    return wrap_codes(weight.data, state)


def quantization_of(weight: Params4bit) -> QuantConfig:
    """How a weight was quantized."""
    state = weight.quant_state
    return QuantConfig(state.quant_type, state.nested, state.blocksize)


def block_scales(state: QuantState) -> Tensor:
    """(blocks,) fp32 absmax of each block, after undoing double quantization."""
    if not state.nested:
        return state.absmax.float()
    if isinstance(state, PartState):
        nested = state.state2
        scales = nested.code.index_select(0, state.absmax.int())
        return scales * nested.absmax.index_select(0, state.groups()) + state.offset
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def dequantize_weight(weight: Params4bit, dtype: torch.dtype) -> Tensor:
    """Dequantize a 4-bit weight to (out, in) in `dtype`.

    bitsandbytes' CPU kernel assumes that a row is a whole number of blocks and is wrong by 10 to 40 % if it is not
    (in_features 48, 80, 688, ...). Blocks run over the flattened weight, so rows of one block each give the same
    numbers for every shape; a ragged last block uses the plain version.
    """
    state = weight.quant_state
    if math.prod(state.shape) % state.blocksize:
        return _dequantize_ragged(weight, dtype)
    shape = (math.prod(state.shape) // state.blocksize, state.blocksize)
    dense = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.data, block_scales(state), state.blocksize, state.quant_type, shape, dtype
    )
    return dense.view(state.shape)


@cache
def cpu_kernel(quant_type: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """bitsandbytes' function (codes, scales, out, block size, rows, columns), which its torch operator calls."""
    from bitsandbytes.cextension import lib

    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
    functions = getattr(lib, "_lib", None)  # bitsandbytes' wrapper has a function that raises for any name
    return getattr(functions, f"cdequantize_blockwise_cpu_{quant_type}_{short}", None)


def _dequantize_ragged(weight: Params4bit, dtype: torch.dtype) -> Tensor:
    """`dequantize_weight` in plain torch, for weights whose last block is ragged."""
    state = weight.quant_state
    codes = weight.data.view(torch.uint8).flatten().long()
    codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: math.prod(state.shape)]
    scales = block_scales(state).repeat_interleave(state.blocksize)[: codes.numel()]
    table = state.code.to(codes.device)
    return (table[codes] * scales).view(state.shape).to(dtype)
