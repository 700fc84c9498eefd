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

import copy
import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.errors import InputError
from qlora.few_rows import product_4bit, product_16bit
from qlora.imports import importing_bitsandbytes
from qlora.many_rows import multiply_4bit, multiply_16bit

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

BLOCK_SIZES = (64, 128, 256, 512, 1024)
DECODE_ROWS = 64  # up to so many rows the decoding copy is used; more are a prompt, best on the training path
Decode = Callable[[Tensor], Tensor]
PIECE = 1 << 20  # weights quantized at a time on a CPU: a multiple of every block size


@dataclass(frozen=True)
class QuantConfig:
    """How the base is quantized. Part of the cache key: two configs never share a cached model."""

    quant_type: str = "nf4"  # "nf4" or "fp4"
    double_quant: bool = True  # quantize the fp32 block scales to 8 bits as well
    block_size: int = 64  # weights that share one scale

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise InputError(f"quant_type is {self.quant_type!r:.60}; choose nf4 or fp4.")
        if type(self.double_quant) is not bool:
            raise InputError(f"double_quant is {self.double_quant!r:.60}; give true or false.")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise InputError(f"block_size is {self.block_size!r:.60}; choose one of {BLOCK_SIZES}.")


def quantize_weight(weight: Tensor, config: QuantConfig) -> Params4bit:
    """Quantize one weight where it lies, the same bits as bitsandbytes' `quantize_4bit`.

    Blocks are independent, so a CPU weight is quantized in cache-sized pieces: 3 times as fast as in one
    call, and the temporaries of that call (ten bytes per weight) never exist.

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
        state.offset, state.absmax, state.state2 = _quantize_scales(scales)
        state.nested = True
    return _params4bit(codes, state)


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


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    """(mean, 8-bit scales less the mean, their own state) of all scales of a weight."""
    offset = scales.mean()
    # bitsandbytes would keep the table of its first call for all later ones, from the meta device too.
    table = torch.empty(256, device="meta") if scales.is_meta else None
    return offset, *quantize_blockwise(scales - offset, table, blocksize=256)


def _params4bit(packed: Tensor, state: QuantState) -> Params4bit:
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


def quantization_of(weight: Params4bit) -> QuantConfig:
    """How a weight was quantized."""
    state = weight.quant_state
    return QuantConfig(state.quant_type, state.nested, state.blocksize)


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a weight (out, in): of its rows (dim 0) or of its columns (dim 1)."""

    dim: int
    index: int
    count: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of a tensor with the weight's rows or columns; a view."""
        size = whole.shape[self.dim] // self.count
        return whole.narrow(self.dim, self.index * size, size)

    def among_zeros(self, part: Tensor) -> Tensor:
        """The whole tensor with `part` in its place and zeros in that of the others."""
        whole = part.new_zeros(self.whole_shape(part.shape))
        self.of(whole).copy_(part)
        return whole

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what a tensor of this shape is a part of."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(shape))


def part_of(layer: nn.Module) -> Part | None:
    """Which part of its weight a layer holds (tensor_parallel.py); None: all of it."""
    part: Part | None = getattr(layer, "part", None)
    return part


class PartState(QuantState):
    """Statistics of a part of a quantized weight: its own blocks' scales, in 8 bits where they were.

    Double quantization's groups of scales run over the whole weight, so their fp32 scales and the offset, two
    thousandths of it, are kept whole, and the group of a block follows from its place there.
    """

    def __init__(self, whole: QuantState, part: Part) -> None:
        rows, columns = whole.shape
        scales = part.of(whole.absmax.view(rows, -1)).clone(memory_format=torch.contiguous_format)
        shape = [rows, columns]
        shape[part.dim] //= part.count
        super().__init__(
            scales.view(-1), torch.Size(shape), whole.code, whole.blocksize, whole.quant_type, whole.dtype,
            whole.offset, whole.state2,
        )  # fmt: skip
        self.part = part

    def groups(self) -> Tensor:
        """(blocks,) int32: in which group of scales each block's scale was quantized."""
        (rows, columns), part = self.shape, self.part
        kind: dict[str, Any] = {"dtype": torch.int32, "device": self.absmax.device}
        row, block = torch.arange(rows, **kind), torch.arange(columns // self.blocksize, **kind)
        row_blocks = part.whole_shape(self.shape)[1] // self.blocksize
        if part.dim == 0:
            row += part.index * rows
        else:
            block += part.index * len(block)
        return ((row * row_blocks)[:, None] + block).view(-1) // self.state2.blocksize


def cut_weight(weight: Params4bit, part: Part) -> Params4bit:
    """A part of a quantized weight as one of its own, copied; it stands for the same numbers bit for bit.

    Raises:
        ValueError: the parts are no whole numbers of blocks.
    """
    rows, columns = weight.quant_state.shape
    block_size = weight.quant_state.blocksize
    width = columns // part.count if part.dim == 1 else columns
    if (rows, columns)[part.dim] % part.count or width % block_size:
        raise ValueError(
            f"{rows} x {columns} in {part.count} parts of {'columns' if part.dim else 'rows'}, where every row "
            f"has to be a whole number of blocks of {block_size}"
        )
    codes = part.of(weight.data.view(rows, -1)).clone(memory_format=torch.contiguous_format)
    return _params4bit(codes.view(-1, 1), PartState(weight.quant_state, part))


def block_scales(state: QuantState) -> Tensor:
    """(blocks,) fp32 absmax of each block, double quantization undone."""
    if not state.nested:
        return state.absmax.float()
    if isinstance(state, PartState):
        nested = state.state2
        scales = nested.code.index_select(0, state.absmax.int())
        return scales * nested.absmax.index_select(0, state.groups()) + state.offset
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def dequantize_weight(weight: Params4bit, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight that the 4-bit codes stand for, in `dtype`.

    bitsandbytes' CPU kernel assumes that a row is a whole number of blocks and is wrong by 10 to 40 % where
    it is not (in_features 48, 80, 688, ...). Blocks run over the flattened weight, so asking for rows of
    exactly one block is the same numbers for every shape; a ragged last block goes to the plain version.
    """
    state = weight.quant_state
    if math.prod(state.shape) % state.blocksize:
        return _dequantize_ragged(weight, dtype)
    shape = (math.prod(state.shape) // state.blocksize, state.blocksize)
    dense = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.data, block_scales(state), state.blocksize, state.quant_type, shape, dtype
    )
    return dense.view(state.shape)


def borrow_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """`dense_weight` for a product that comes at once: the next call in this thread may write over it.

    A fresh tensor of this size is fresh memory, and its page faults take longer than dequantizing into it. On a
    CPU bitsandbytes' kernel therefore writes into one buffer per thread, as large as the largest weight.
    """
    weight: Any = layer.weight
    run = _cpu_kernel(weight.quant_state.quant_type, dtype) if isinstance(weight, Params4bit) else None
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

    From W as it is stored where there is a kernel for that (many_rows.py), else W is dequantized.
    """
    weight: Any = layer.weight
    rows, product = x.reshape(-1, x.shape[-1]), None
    if isinstance(weight, Params4bit):
        product = multiply_4bit(rows, weight.data, block_scales, weight.quant_state, bias, backward)
    elif _is_upright(layer):
        product = multiply_16bit(rows, weight.detach(), bias, backward)
    if product is None:
        weight = borrow_weight(layer, x.dtype)
        return x @ weight if backward else F.linear(x, weight, bias)
    return product.view(*x.shape[:-1], product.shape[-1])


def forget_buffer() -> None:
    """Let go of this thread's buffer, where what follows needs a smaller one."""
    _buffers.bytes = None


_buffers = threading.local()


@cache
def _cpu_kernel(quant_type: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """bitsandbytes' (codes, scales, out, block size, rows, columns), which its torch operator calls too."""
    from bitsandbytes.cextension import lib

    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
    functions = getattr(lib, "_lib", None)  # bitsandbytes' wrapper of it has a function that raises for any name
    return getattr(functions, f"cdequantize_blockwise_cpu_{quant_type}_{short}", None)


def _dequantize_ragged(weight: Params4bit, dtype: torch.dtype) -> Tensor:
    """`dequantize_weight` in plain torch, for weights whose last block is ragged."""
    state = weight.quant_state
    codes = weight.data.view(torch.uint8).flatten().long()
    codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: math.prod(state.shape)]
    scales = block_scales(state).repeat_interleave(state.blocksize)[: codes.numel()]
    table = state.code.to(codes.device)
    return (table[codes] * scales).view(state.shape).to(dtype)


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer with a forward that never touches its weight.

    The parent's forward repacks the weight in place when it evaluates on an AVX512-BF16 CPU; after that it
    neither trains nor dequantizes (every gradient below is lost, silently). Ours runs `FrozenLinear` in
    training and evaluation alike.
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


class ShardedLinear4bit(nn.Linear):
    """A `Linear4bit` whose codes and scales are plain frozen parameters, which FSDP2 shards on their first axis.

    With M = out * in weights in blocks of b:

        codes           (M / b, b / 2) uint8          a row is a block
        scales          (M / b,)                      uint8 under double quantization, else fp32
        nested_scales   (ceil(M / b / 256),) fp32     under double quantization

    Tables and the scales' mean are the same everywhere. While FSDP2 has the layer gathered, `weight` costs
    nothing; at other times reading it is a collective.

    Args:
        layer: on the meta device, and what is made of it as well.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    nested_scales: nn.Parameter | None
    offset: Tensor | None  # mean of the scales, taken off before they were quantized

    def __init__(self, layer: Linear4bit) -> None:
        nn.Module.__init__(self)
        weight: Any = layer.weight
        state = weight.quant_state
        self.out_features, self.in_features = state.shape
        self.config, self.dtype = quantization_of(weight), state.dtype
        blocks = state.absmax.numel()
        if blocks * self.config.block_size != math.prod(state.shape):
            raise InputError(
                f"A weight of {tuple(state.shape)} is no whole number of blocks of {self.config.block_size}, and "
                "cannot be split; leave out --shard."
            )
        self._add("codes", (blocks, self.config.block_size // 2), torch.uint8)
        self._add("scales", (blocks,), state.absmax.dtype)
        self.nested_scales = None
        if state.nested:
            self._add("nested_scales", tuple(state.state2.absmax.shape), torch.float32)
        self.offset = None
        self.table = self.nested_table = torch.empty(0)
        self.compute_device = torch.device("cpu")
        self.register_parameter("bias", layer.bias)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))

    @property
    def weight(self) -> Params4bit:  # type: ignore[override]
        """The whole 4-bit weight."""
        state = QuantState(
            absmax=whole(self.scales),
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            blocksize=self.config.block_size,
            code=self.table,
            quant_type=self.config.quant_type,
        )
        if self.nested_scales is not None:
            nested = QuantState(
                whole(self.nested_scales), blocksize=256, code=self.nested_table, dtype=torch.float32
            )
            state.offset, state.state2, state.nested = self.offset, nested, True
        return _params4bit(whole(self.codes).view(-1, 1), state)

    def count_weights(self) -> None:
        """Tell `logical_numel` what the parameters stand for; they are others after FSDP2 has taken them."""
        for part in (self.codes, self.scales, self.nested_scales):
            if part is not None:
                vars(part)["logical_numel"] = self.out_features * self.in_features if part is self.codes else 0

    def take_codes(self, weight: Params4bit, blocks: slice, chunk: Callable[[int], slice]) -> Tensor:
        """Fill this process' shards from a whole weight's, which may be a view of a file.

        Args:
            blocks: those of this process.
            chunk: the part of a first axis of some length that is this process'.
        Returns:
            the codes it took, (bytes,).
        """
        state, half = weight.quant_state, self.config.block_size // 2
        scales, nested = state.absmax, state.state2.absmax if state.nested else None
        self._take(weight.data.view(-1, half)[blocks], scales[blocks], nested, chunk)
        self._take_constants(state.code, state.state2.code if state.nested else None, state.offset)
        return weight.data.view(-1)[blocks.start * half : blocks.stop * half]

    def take_dense(
        self, flat: Tensor, blocks: slice, chunk: Callable[[int], slice], gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Quantize this process' blocks of a weight, (values,); arguments and result as `take_codes`.

        Args:
            gather: makes of each process' scales those of the whole weight, which have one mean.
        """
        config, half = self.config, self.config.block_size // 2
        if flat.numel():
            codes, scales = quantize_blocks(flat, config)
        else:  # more processes than blocks
            codes, scales = flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, dtype=torch.float32)
        table, nested = get_4bit_type(config.quant_type, device=flat.device), None
        if config.double_quant:
            offset, every, state = _quantize_scales(gather(scales))
            scales, nested = every[blocks], state.absmax
            self._take_constants(table, state.code, offset)
        else:
            self._take_constants(table, None, None)
        self._take(codes.view(-1, half), scales, nested, chunk)
        return codes.view(-1)

    def _take(self, codes: Tensor, scales: Tensor, nested: Tensor | None, chunk: Callable[[int], slice]) -> None:
        local(self.codes).copy_(codes)
        local(self.scales).copy_(scales)
        if self.nested_scales is not None and nested is not None:
            local(self.nested_scales).copy_(nested[chunk(len(nested))])

    def _take_constants(self, table: Tensor, nested_table: Tensor | None, offset: Tensor | None) -> None:
        device = self.compute_device
        self.table = table.to(device, copy=True)
        if nested_table is not None and offset is not None:
            self.nested_table, self.offset = nested_table.to(device, copy=True), offset.to(device, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; any other as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, in a collective; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Linear16bit(nn.Linear):
    """A frozen dense layer stored in bf16 that computes in its input's dtype.

    `nn.Linear` wants both dtypes equal; on a CPU without fast bf16 the activations are fp32 while the
    weights (lm_head, or the whole base under `--no-4bit`) should stay at two bytes each.
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
    """One bare matrix of an expert, (out, in), in 4 bits or 16; frozen, and no target of LoRA.

    A checkpoint of many experts holds thousands of these; a token meets a few of them in each layer.
    """

    bias = None

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


@cache
def frozen_conv1d() -> type[nn.Module]:
    """transformers' Conv1D (GPT-2's layer, weight (in, out)) with `Linear16bit`'s forward."""
    from transformers.pytorch_utils import Conv1D

    class Conv1D16bit(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return frozen_linear(x, self)

    return Conv1D16bit


def _decode_or_train(layer: Linear4bit | Linear16bit, x: Tensor) -> Tensor:
    if layer.decode is not None and x.numel() <= DECODE_ROWS * x.shape[-1] and not torch.is_grad_enabled():
        return layer.decode(x)
    return frozen_linear(x, layer)


def decode_in_place(layer: Linear4bit | Linear16bit, dtype: torch.dtype) -> Decode | None:
    """A function for the few rows of a decoding step, from the weight as it is stored, with the training path's
    numbers; None where there is no kernel for it.
    """
    weight, bias = layer.weight, layer_bias(layer, dtype)
    if isinstance(weight, Params4bit):
        whole = not isinstance(weight.quant_state, PartState)  # the kernel finds a scale's group by itself
        return product_4bit(weight.data, weight.quant_state, bias, dtype) if whole else None
    return product_16bit(weight, bias)


def decode_copy(layer: Linear4bit | Linear16bit, dtype: torch.dtype, dense: bool) -> Decode:
    """A function for the few rows of a decoding step, from a *copy* of the weight in a layout made for them.

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


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a frozen linear layer or Conv1D, in `dtype`; a view where it can be."""
    weight = layer.weight
    if isinstance(weight, Params4bit):
        return dequantize_weight(weight, dtype)
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return (weight if _is_upright(layer) else weight.T).to(dtype)


def logical_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear4bit, Linear or Conv1D, whatever its storage; of the whole where it is a part."""
    if isinstance(layer, nn.Linear):
        rows, columns = layer.out_features, layer.in_features
    else:
        weight: Any = layer.weight
        rows, columns = weight.quant_state.shape if isinstance(weight, Params4bit) else weight.shape[::-1]
    part = part_of(layer)
    return (rows, columns) if part is None else part.whole_shape((rows, columns))  # type: ignore[return-value]


def logical_numel(parameter: Tensor) -> int:
    """Number of weights a parameter stands for: a packed 4-bit tensor holds two per byte, a part them all."""
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        return math.prod(state.shape) * (state.part.count if isinstance(state, PartState) else 1)
    return int(getattr(parameter, "logical_numel", parameter.numel()))


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

    Where the weight has to train after all, through an ordinary layer.
    """
    weight: Any = layer.weight
    if weight.requires_grad:  # an adapter's copy, or a 16-bit base that was unfrozen
        weight = (weight if _is_upright(layer) else weight.T).to(x.dtype)
        return F.linear(x, weight, layer_bias(layer, x.dtype))
    return FrozenLinear.apply(x, layer.bias, layer)


def _is_upright(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as (out, in); Conv1D has (in, out)."""
    return isinstance(layer, (nn.Linear, FrozenMatrix))


def packed_tensors(weight: Params4bit) -> dict[str, Tensor]:
    """The tensors that store a 4-bit weight, named by bitsandbytes' suffixes ("" for the codes)."""
    return {"": weight.data, **{f".{k}": v for k, v in weight.quant_state.as_dict(packed=True).items()}}


def packed_shape(quant_state: Tensor) -> tuple[int, ...]:
    """Logical shape of a 4-bit weight from its stored `quant_state` tensor, the others unread.

    Raises:
        ValueError: the tensor holds none.
    """
    from bitsandbytes.utils import unpack_tensor_to_dict

    try:
        return tuple(unpack_tensor_to_dict(quant_state)["shape"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # it is JSON in a tensor of bytes
        raise ValueError(f"no shape in its quant_state: {error}") from error


def unpack_tensors(tensors: dict[str, Tensor], device: torch.device) -> Params4bit:
    """The inverse of `packed_tensors`, bit for bit.

    Raises:
        ValueError: parts that do not belong together; the kernels trust their sizes and would read past them.
    """
    stats = {suffix[1:]: tensor for suffix, tensor in tensors.items() if suffix}
    try:
        state = QuantState.from_dict(stats, device=device)
    # Its fields are JSON of any type, taken as they come; a foreign one is an AssertionError.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"its quant_state does not read: {error}") from error
    except AssertionError as error:
        raise ValueError("its quant_state holds foreign fields") from error
    _check_parts(tensors[""], state)
    return _params4bit(tensors[""].to(device), state)


def _check_parts(codes: Tensor, state: QuantState) -> None:
    """Type and size of every part of a 4-bit weight."""
    shape, block_size = state.shape or (), state.blocksize
    if len(shape) != 2 or min(shape) < 1 or not isinstance(state.dtype, torch.dtype):
        raise ValueError(f"its shape is {tuple(shape)}, its dtype {state.dtype!r:.60}")
    QuantConfig(state.quant_type, state.nested, block_size)  # names a type or block size that there is not
    num_blocks = -(-math.prod(shape) // block_size)
    wanted = {
        "codes": (codes.numel() * codes.element_size(), -(-math.prod(shape) // 2)),
        "table": (state.code.numel(), 16),
        "scales": (state.absmax.numel(), num_blocks),
    }
    floats = [state.code]
    if state.nested:
        nested_size = state.state2.blocksize
        if type(nested_size) is not int or nested_size < 1 or state.absmax.dtype != torch.uint8:
            raise ValueError(f"nested block size {nested_size!r:.60}, scales in {state.absmax.dtype}")
        wanted["nested scales"] = (state.state2.absmax.numel(), -(-num_blocks // nested_size))
        wanted["nested table"] = (state.state2.code.numel(), 256)
        floats += [state.state2.absmax, state.state2.code]
    else:
        floats += [state.absmax]
    wrong = [f"{part} {actual} instead of {right}" for part, (actual, right) in wanted.items() if actual != right]
    wrong += [f"a table or scales in {part.dtype}" for part in floats if part.dtype != torch.float32]
    if wrong:
        raise ValueError(f"for the shape {tuple(shape)}: {', '.join(wrong)}")
