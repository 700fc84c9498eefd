"""Cut 4-bit weights into parts for tensor parallelism, gather sharded tensors, and sum what the parts computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.quant.library import Params4bit, QuantState, wrap_codes


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a weight (out, in), by rows (dim 0) or columns (dim 1)."""

    dim: int
    index: int
    count: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of a tensor with the weight's rows or columns; a view."""
        size = whole.shape[self.dim] // self.count
        return whole.narrow(self.dim, self.index * size, size)

    def among_zeros(self, part: Tensor) -> Tensor:
        """The whole tensor with `part` in its place and zeros elsewhere."""
        whole = part.new_zeros(self.whole_shape(part.shape))
        self.of(whole).copy_(part)
        return whole

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole tensor of which a part has `shape`."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(shape))


class Divisible:
    """A layer that may hold only a part of its weight (parallel/tensor_parallel.py).

    Attributes:
        part: which part; None = the whole layer.
    """

    part: Part | None = None

    def count_weights(self, kind: str, parameter: Tensor) -> int:
        """Number of weights of the whole layer that one of its parameters represents.

        Args:
            kind: the parameter's name in the layer.
        """
        if isinstance(parameter, Params4bit):
            return math.prod(parameter.quant_state.shape) * (self.part.count if self.part is not None else 1)
        is_cut = self.part is not None and not (kind == "bias" and self.part.dim == 1)
        return parameter.numel() * (self.part.count if self.part is not None and is_cut else 1)


def part_of(layer: nn.Module) -> Part | None:
    """The part of its weight that a layer holds; None: all of it."""
    return layer.part if isinstance(layer, Divisible) else None


class PartState(QuantState):
    """State of a part of a quantized weight: its own blocks' scales, in 8 bits under double quantization.

    Double quantization groups scales over the whole weight, so the groups' fp32 scales and the offset (0.2 % of
    the weight) are kept whole; a block's place in the whole weight gives its group.
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
        """(blocks,) int32: the group in which each block's scale was quantized."""
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
    """Copy a part of a quantized weight as a weight of its own; it dequantizes to the same numbers bit for bit.

    Raises:
        ValueError: the parts are not whole numbers of blocks.
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
    return wrap_codes(codes.view(-1, 1), PartState(weight.quant_state, part))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; other tensors unchanged."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective); other tensors unchanged."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


# ---- sums over processes that hold a part each ---------------------------------------------------------


class SumOutput(torch.autograd.Function):
    """The sum over a group's processes; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


class SumGradient(torch.autograd.Function):
    """x itself; the gradient is summed over a group's processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return sum_over(dy, ctx.group), None


def sum_over(x: Tensor, group: Any) -> Tensor:
    """The sum of x over a group's processes, in a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total
