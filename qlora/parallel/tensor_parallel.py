"""Tensor parallel: T processes compute each layer together (Megatron-LM, arXiv 1909.08053 section 3), with LoRA.

Process r of T holds of every decoder block, with W (out, in) as in lora/layer.py,

    by rows (column parallel)       q, k, v, gate, up: W_r = W[rows of r]         y_r = x W_r'^T
    by columns (row parallel)       o, down: W_r = W[:, columns of r]             y = sum over r of x_r W_r'^T
    whole                           norms, embeddings, the output head; process 0 adds the bias of o and down

so it computes whole heads and some columns of the MLP. A 4-bit weight is quantized once, whole, and its codes and
8-bit scales are sliced: the parts dequantize to the whole's numbers, bit for bit. Quantized separately, each part
would have another offset in double quantization.

An adapter's A (R, in) and B (out, R) are whole on every process, which computes with its part of them:

    by rows       h = x A^T          y_r = x W_r^T + s h B_r^T              dB_r, zeros elsewhere; dA a partial sum
    by columns    h_r = x_r A_r^T    y = sum of x_r W_r^T + s h_r B^T       dA_r, zeros elsewhere; dB a partial sum

so in both cases the gradients of A and of B are the sums over all processes (training/loop.py).

Communication, with N tokens, D hidden, c bytes of the compute dtype; two conjugate functions:

    enter    x -> x             backward: the sum of dx over the group      before q, k, v and before gate, up
    leave    y -> sum of y      backward: dy -> dy                          after o and after down

so a block makes two all-reduces of c N D in the forward pass and two in the backward pass, none of the latter if
nothing below needs a gradient. A recomputed block makes one more: torch stops before the last one, whose sum is
not saved.

With sequence parallelism (arXiv 2205.05198) the norms and the residual stream are split by tokens,
ceil(length / T) of each row per process, and

    enter    own tokens -> all tokens: all-gather                  backward: reduce-scatter
    leave    all tokens' partial sums -> own: reduce-scatter       backward: all-gather

A ring all-reduce is a reduce-scatter and an all-gather, so the traffic is the same. Kept for the backward pass,
per token and block: c 2 D / T instead of c 2 D for the inputs of two norms, c D / T instead of c D for the input
of a recomputed block. Adapted layers still keep inputs of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.model.base import base_info
from qlora.model.block import Exchange, decoder_layers, is_fused
from qlora.model.fingerprint import sample_weight
from qlora.model.hf_config import load_config
from qlora.parallel.divisibility import check_widths, split_axis
from qlora.quant.layers import Linear4bit, Linear16bit
from qlora.quant.library import Params4bit
from qlora.quant.parts import Part, SumGradient, SumOutput, cut_weight
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks

# ---- communication ----------------------------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """(B, own, D) -> (B, length, D); the gradient is summed over the processes (`is_summed`) or whole on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: GroupExchange, length: int, is_summed: bool) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.is_summed = exchange, is_summed
        return exchange.gather(x, length)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        exchange: GroupExchange = ctx.exchange
        return exchange.reduce_scatter(dx) if ctx.is_summed else exchange.own(dx), None, None, None


class _Scattered(torch.autograd.Function):
    """(B, length, D) -> (B, own, D), of the sum over the group (`is_summed`) or of a tensor equal on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: GroupExchange, is_summed: bool) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.length = exchange, x.shape[1]
        return exchange.reduce_scatter(x) if is_summed else exchange.own(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.exchange.gather(dy, ctx.length), None, None


@dataclass(frozen=True)
class GroupExchange(Exchange):
    """Communication of a tensor parallel group within a block.

    Args:
        is_first, is_last: whether the block is the first (splits tokens) or the last (gathers them).
    """

    ranks: Ranks
    is_first: bool
    is_last: bool

    def begin(self, hidden: Tensor) -> Tensor:
        if not (self.ranks.sequence_parallel and self.is_first):
            return hidden
        return _Scattered.apply(hidden, self, False)

    def enter(self, y: Tensor, length: int) -> Tensor:
        if self.ranks.sequence_parallel:
            return _Gathered.apply(y, self, length, True)
        return SumGradient.apply(y, self.ranks.tensor_group)

    def leave(self, o: Tensor) -> Tensor:
        if self.ranks.sequence_parallel:
            return _Scattered.apply(o, self, True)
        return SumOutput.apply(o, self.ranks.tensor_group)

    def end(self, x: Tensor, length: int) -> Tensor:
        if not (self.ranks.sequence_parallel and self.is_last):
            return x
        return _Gathered.apply(x, self, length, False)

    def collect(self, x: Tensor, length: int) -> Tensor:
        return self.gather(x, length) if self.ranks.sequence_parallel and not self.is_last else x

    def gather(self, x: Tensor, length: int) -> Tensor:
        """(B, own, D) -> (B, length, D)"""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.ranks.tensor_size)]
        torch.distributed.all_gather(parts, x, group=self.ranks.tensor_group)
        return torch.cat(parts, dim=1)[:, :length]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """(B, length, D) partial sums -> (B, own, D) of their sum"""
        parts = self._parts(x)
        total = torch.empty_like(parts[0])
        torch.distributed.reduce_scatter(total, parts, group=self.ranks.tensor_group)
        return total

    def own(self, x: Tensor) -> Tensor:
        """(B, length, D) -> (B, own, D)"""
        return self._parts(x)[self.ranks.tensor_rank]

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Every process's tokens, the last ones' padded with zeros."""
        size = -(-x.shape[1] // self.ranks.tensor_size)
        padded = F.pad(x, (0, 0, 0, size * self.ranks.tensor_size - x.shape[1]))
        return [part.contiguous() for part in padded.split(size, dim=1)]


# ---- cutting weights --------------------------------------------------------------------------------------


def split_of(layer: str, ranks: Ranks) -> Part | None:
    """The part of a layer (qualified name) that this process holds; None: all of it."""
    axis = split_axis(layer)
    return None if axis is None else Part(axis, ranks.tensor_rank, ranks.tensor_size)


class WeightCut:
    """Cuts a model's weights as they are loaded to the parts that this process keeps.

    The parts are copies, so that the whole weights are freed.

    Args:
        model: as for `load_base_model`; only its config is read.
    Attributes:
        samples: name -> sample of each whole weight that was cut, for the base's fingerprint.
    Raises:
        InputError: the model's layers do not divide (`check_widths`).
    """

    def __init__(self, model: str, ranks: Ranks) -> None:
        check_widths(load_config(model), ranks.tensor_size, model)
        self.ranks = ranks
        self.samples: dict[str, bytes] = {}

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """The `cut` of `load_base_model`."""
        layer, _, kind = name.rpartition(".")
        part = split_of(layer, self.ranks)
        if part is None:
            return weight
        self.samples[name] = sample_weight(name, weight)
        if kind == "bias" and part.dim == 1:
            return weight if part.index == 0 else torch.zeros_like(weight)
        if not isinstance(weight, Params4bit):
            return part.of(weight).clone()
        try:
            return cut_weight(weight, part)
        except ValueError as error:
            raise InputError(f"--tensor-parallel {part.count} does not divide {name} ({error}).") from error


def split_model(network: Any, cut: WeightCut) -> None:
    """Make a network that was loaded with `cut` compute with its group, in place.

    Its `BaseInfo` then says how it is split.

    Raises:
        InputError: model/block.py does not compute one of its blocks.
    """
    ranks, layers = cut.ranks, decoder_layers(network)
    other = [type(layer).__name__ for layer in layers if not is_fused(layer)]
    if other:
        raise InputError(
            f"The blocks {other[0]} of this model have another activation than SiLU, or dropout in their "
            "attention, which tensor parallel does not compute; use --shard fsdp."
        )
    whole = {name: sample_weight(name, weight) for name, weight in network.named_parameters()}
    network.base_info = replace(base_info(network), ranks=ranks, weight_samples=whole | cut.samples)
    for name, module in network.named_modules():
        if isinstance(module, (Linear4bit, Linear16bit)):
            module.part = split_of(name, ranks)
    for index, layer in enumerate(layers):
        layer.exchange = GroupExchange(ranks, index == 0, index == len(layers) - 1)
