"""A 4-bit layer whose codes and scales FSDP2 shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora.quant.layers import Linear4bit, frozen_linear
from qlora.quant.library import Params4bit, QuantState, get_4bit_type, wrap_codes
from qlora.quant.linear import plain_type
from qlora.quant.parts import Divisible, local, whole
from qlora.quant.weight import quantization_of, quantize_blocks, quantize_scales
from qlora.system.errors import InputError


@plain_type
class ShardedLinear4bit(Divisible, nn.Linear):
    """A `Linear4bit` whose codes and scales are plain frozen parameters, so that FSDP2 shards their first axis.

    With M = out * in weights in blocks of b:

        codes           (M / b, b / 2) uint8          a row is a block
        scales          (M / b,)                      uint8 under double quantization, else fp32
        nested_scales   (ceil(M / b / 256),) fp32     under double quantization

    Every process has the tables and the scales' mean. While FSDP2 has the layer gathered, `weight` costs nothing;
    otherwise reading it is a collective.

    Args:
        layer: on the meta device, as is the new layer.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    nested_scales: nn.Parameter | None
    offset: Tensor | None  # mean of the scales, subtracted before they were quantized

    def __init__(self, layer: Linear4bit) -> None:
        nn.Module.__init__(self)
        weight: Any = layer.weight
        state = weight.quant_state
        self.out_features, self.in_features = state.shape
        self.config, self.dtype = quantization_of(weight), state.dtype
        blocks = state.absmax.numel()
        if blocks * self.config.block_size != math.prod(state.shape):
            raise InputError(
                f"A weight of {tuple(state.shape)} does not have whole blocks of {self.config.block_size}, and "
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
        return wrap_codes(whole(self.codes).view(-1, 1), state)

    def count_weights(self, kind: str, parameter: Tensor) -> int:
        """Number of weights of the whole layer in a parameter: all in the codes, none in the scales."""
        if kind == "codes":
            return self.out_features * self.in_features
        return 0 if kind in ("scales", "nested_scales") else parameter.numel()

    def take_codes(self, weight: Params4bit, blocks: slice, chunk: Callable[[int], slice]) -> Tensor:
        """Fill this process's shards from a whole weight, which may be a view of a file.

        Args:
            blocks: this process's blocks.
            chunk: length of a first axis -> this process's part of it.
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
        """Quantize this process's blocks of a weight, (values,); blocks, chunk and result as in `take_codes`.

        Args:
            gather: this process's scales -> those of the whole weight, which share one mean.
        """
        config, half = self.config, self.config.block_size // 2
        if flat.numel():
            codes, scales = quantize_blocks(flat, config)
        else:  # more processes than blocks
            codes, scales = flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, dtype=torch.float32)
        table, nested = get_4bit_type(config.quant_type, device=flat.device), None
        if config.double_quant:
            offset, every, state = quantize_scales(gather(scales))
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
