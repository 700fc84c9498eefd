"""Functions that multiply the few rows of a decoding step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.kernels.gemv import product_4bit, product_16bit
from qlora.quant.layers import Decode, Linear4bit, Linear16bit, dense_weight, frozen_linear, layer_bias
from qlora.quant.library import Params4bit, bnb, gemv_4bit, has_avx512bf16
from qlora.quant.parts import PartState


def decode_in_place(layer: Linear4bit | Linear16bit, dtype: torch.dtype) -> Decode | None:
    """A function for the few rows of a decoding step that uses the stored weight and gives the training path's
    numbers; None if there is no kernel for it.
    """
    weight, bias = layer.weight, layer_bias(layer, dtype)
    if isinstance(weight, Params4bit):
        whole = not isinstance(weight.quant_state, PartState)  # the kernel computes a scale's group itself
        return product_4bit(weight.data, weight.quant_state, bias, dtype) if whole else None
    return product_16bit(weight, bias)


def decode_copy(layer: Linear4bit | Linear16bit, dtype: torch.dtype, dense: bool) -> Decode:
    """A function for the few rows of a decoding step that uses a *copy* of the weight in a suitable layout.

    Args:
        dense: copy the weight in `dtype` (the numbers of the training path); otherwise repack its 4 bits
            for bitsandbytes' AVX512-BF16 kernel (activations and scales rounded to bf16) where it applies.
    """
    weight, bias = layer.weight, layer_bias(layer, dtype)
    if isinstance(weight, Params4bit) and not isinstance(weight.quant_state, PartState):
        rows, columns = weight.quant_state.shape
        if weight.is_cuda:
            return lambda x: bnb.matmul_4bit(x, weight.data.t(), quant_state=weight.quant_state, bias=bias)
        if not dense and has_avx512bf16() and rows % 32 == 0 and columns % weight.quant_state.blocksize == 0:
            from bitsandbytes.functional import _convert_weight_packed_for_cpu

            packed, state = _convert_weight_packed_for_cpu(weight.data.clone(), copy.deepcopy(weight.quant_state))

            def packed_linear(x: Tensor) -> Tensor:
                y = gemv_4bit(x, packed, state=state)
                return y if bias is None else y + bias

            return packed_linear
        if not dense:
            return lambda x: frozen_linear(x, layer)
    copied = dense_weight(layer, dtype)
    return lambda x: F.linear(x, copied, bias)
