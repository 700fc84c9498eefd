"""Frozen linear layers in 4 or 16 bits, and the product y = x W^T + b that saves no activation."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.kernels.gemm import multiply_4bit, multiply_16bit
from qlora.quant.library import Params4bit, bnb, get_ptr
from qlora.quant.linear import conv1d, plain_type, registered_shape
from qlora.quant.parts import Divisible, PartState, part_of
from qlora.quant.weight import block_scales, cpu_kernel, dequantize_weight
from qlora.system.errors import InputError

DECODE_ROWS = 64  # most rows that use the decoding copy; more are a prompt, faster on the training path
Decode = Callable[[Tensor], Tensor]


def dequantize_into_scratch(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """`dense_weight` for immediate use: the next call in this thread may overwrite it.

    The page faults of a fresh tensor this large take longer than dequantizing into it. So on a CPU bitsandbytes'
    kernel writes into one buffer per thread, as large as the largest weight.
    """
    weight: Any = layer.weight
    run = cpu_kernel(weight.quant_state.quant_type, dtype) if isinstance(weight, Params4bit) else None
    if run is None or weight.device.type != "cpu":
        return dense_weight(layer, dtype)
    state = weight.quant_state
    count, block_size = math.prod(state.shape), state.blocksize
    if count % block_size:
        return dense_weight(layer, dtype)
    buffer = getattr(_buffers, "bytes", None)
    if buffer is None or buffer.numel() < count * dtype.itemsize:
        with torch.inference_mode(False):  # it outlives a generation
            buffer = _buffers.bytes = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    scales = block_scales(state).contiguous()
    numbers = (ctypes.c_longlong(number) for number in (block_size, count // block_size, block_size))
    run(get_ptr(weight.data), get_ptr(scales), get_ptr(buffer), *numbers)
    return buffer[: count * dtype.itemsize].view(dtype).view(state.shape)


def multiply(x: Tensor, layer: nn.Module, bias: Tensor | None = None, backward: bool = False) -> Tensor:
    """x W^T + b, (..., in) -> (..., out), or x W, (..., out) -> (..., in), for a frozen layer's W.

    Uses the stored W if there is a kernel for it (kernels/gemm.py), else dequantizes W.
    """
    weight: Any = layer.weight
    rows, product = x.reshape(-1, x.shape[-1]), None
    if isinstance(weight, Params4bit):
        product = multiply_4bit(rows, weight.data, block_scales, weight.quant_state, bias, backward)
    elif is_out_in(layer):
        product = multiply_16bit(rows, weight.detach(), bias, backward)
    if product is None:
        weight = dequantize_into_scratch(layer, x.dtype)
        return x @ weight if backward else F.linear(x, weight, bias)
    return product.view(*x.shape[:-1], product.shape[-1])


def drop_scratch() -> None:
    """Free this thread's buffer, if what follows needs a smaller one."""
    _buffers.bytes = None


_buffers = threading.local()


@plain_type
class Linear4bit(Divisible, bnb.nn.Linear4bit):
    """bitsandbytes' layer with a forward that never touches its weight.

    The parent's forward repacks the weight in place when it evaluates on an AVX512-BF16 CPU; after that it neither
    trains nor dequantizes, and all gradients below are silently lost. Ours always runs `FrozenLinear`.
    """

    def __init__(self, weight: Params4bit, bias: Tensor | None) -> None:
        rows, columns = weight.quant_state.shape
        super().__init__(columns, rows, bias=False, quant_type=weight.quant_type, device="meta")
        self.support_avx512bf16_for_cpu = False
        weight.module = self
        self.weight = weight
        self.quant_state = weight.quant_state
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.decode: Decode | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _decode_or_train(self, x)


@plain_type
class Linear16bit(Divisible, nn.Linear):
    """A frozen dense layer stored in bf16 that computes in its input's dtype.

    `nn.Linear` requires equal dtypes; on a CPU without fast bf16 the activations are fp32 while the weights
    (lm_head, or the whole base under `--no-4bit`) should stay at two bytes each.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.decode: Decode | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _decode_or_train(self, x)


class FrozenMatrix(nn.Module):
    """One matrix of an expert, (out, in), in 4 or 16 bits; frozen, and never a LoRA target.

    A checkpoint with many experts holds thousands of these; a token uses a few of them in each layer.
    """

    bias = None

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


@cache
def frozen_conv1d() -> type[nn.Module]:
    """transformers' Conv1D with `Linear16bit`'s forward."""

    @plain_type
    class Conv1D16bit(conv1d()):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return frozen_linear(x, self)

    return Conv1D16bit


plain_type(bnb.nn.Linear4bit)


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes' own layers from repacking their weights as they evaluate on an AVX512-BF16 CPU.

    A repacked weight neither trains nor dequantizes: see `Linear4bit`.

    Raises:
        InputError: a weight is repacked already.
    """
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise InputError(
                    f"bitsandbytes has repacked the weight of {name} for evaluation, which cannot train any more; "
                    "load the model again, and adapt it before it evaluates."
                )


def _decode_or_train(layer: Linear4bit | Linear16bit, x: Tensor) -> Tensor:
    if (
        layer.decode is not None
        and autocast_dtype(x) is None
        and x.numel() <= DECODE_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
    ):
        return layer.decode(x)
    return frozen_linear(x, layer)


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a frozen linear layer or Conv1D, in `dtype`; a view if possible."""
    weight = layer.weight
    if isinstance(weight, Params4bit):
        return dequantize_weight(weight, dtype)
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return (weight if is_out_in(layer) else weight.T).to(dtype)


def logical_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, however stored; of the whole layer if it holds a part."""
    shape = registered_shape(layer)
    if shape is not None:
        return shape.out_features, shape.in_features
    if isinstance(layer, nn.Linear):
        rows, columns = layer.out_features, layer.in_features
    else:
        weight: Any = layer.weight
        rows, columns = weight.quant_state.shape if isinstance(weight, Params4bit) else weight.shape[::-1]
    part = part_of(layer)
    return (rows, columns) if part is None else part.whole_shape((rows, columns))  # type: ignore[return-value]


def logical_sizes(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Every parameter of a module and its submodules, tied ones once, with the number of weights it holds.

    A layer that holds a part counts whole (`Divisible`).
    """
    sizes: dict[int, tuple[nn.Parameter, int]] = {}
    for owner in module.modules():
        for kind, parameter in owner.named_parameters(recurse=False):
            count = (
                owner.count_weights(kind, parameter) if isinstance(owner, Divisible) else logical_numel(parameter)
            )
            sizes.setdefault(id(parameter), (parameter, count))
    return list(sizes.values())


def logical_numel(parameter: Tensor) -> int:
    """Number of weights in a parameter: a packed 4-bit tensor holds two per byte; a part counts whole."""
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        return math.prod(state.shape) * (state.part.count if isinstance(state, PartState) else 1)
    return parameter.numel()


def layer_bias(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """(out,) bias in `dtype`, or None."""
    bias: Any = layer.bias
    return None if bias is None else bias.to(dtype)


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for a frozen W: dx = dy W, with W dequantized again rather than kept; db = sum of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return multiply(x, layer, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        wants_dx, wants_db = ctx.needs_input_grad[:2]
        dx = multiply(dy, ctx.layer, backward=True) if wants_dx else None
        db = dy.flatten(0, -2).sum(dim=0, dtype=torch.float32) if wants_db else None
        return dx, db, None


def frozen_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """(..., in) -> (..., out) through a frozen layer, whose bias may train; no activation is saved.

    If the weight requires a gradient, an ordinary layer computes instead. Under autocast it computes in autocast's
    dtype, as nn.Linear does.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return frozen_linear(x.to(dtype), layer)
    weight: Any = layer.weight
    if weight.requires_grad:  # an adapter's copy, or an unfrozen 16-bit base
        weight = (weight if is_out_in(layer) else weight.T).to(x.dtype)
        return F.linear(x, weight, layer_bias(layer, x.dtype))
    return FrozenLinear.apply(x, layer.bias, layer)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts a linear layer's input; None outside of autocast, and for fp64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def is_out_in(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as (out, in); Conv1D has (in, out)."""
    return isinstance(layer, (nn.Linear, FrozenMatrix)) or registered_shape(layer) is not None
