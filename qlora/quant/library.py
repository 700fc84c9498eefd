"""bitsandbytes, imported once, without its compiler and without code from the hub (see system/startup.py).

The other files of qlora/quant import from here, so that one file lists what is used of the library.
"""

from __future__ import annotations

from torch import Tensor

from qlora.system.startup import importing_bitsandbytes

with importing_bitsandbytes():
    import bitsandbytes as bnb
    from bitsandbytes.functional import (
        QuantState,
        dequantize_blockwise,
        gemv_4bit,
        get_4bit_type,
        get_ptr,
        has_avx512bf16,
        quantize_blockwise,
    )
    from bitsandbytes.nn import Params4bit

__all__ = [
    "Params4bit",
    "QuantState",
    "bnb",
    "dequantize_blockwise",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "has_avx512bf16",
    "quantize_blockwise",
    "wrap_codes",
]


def wrap_codes(packed: Tensor, state: QuantState) -> Params4bit:
    """Packed codes, (bytes, 1) uint8, and their scales as a frozen 4-bit parameter."""
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )
