"""Tensor parallel: T processes compute each layer together (Megatron-LM, arXiv 1909.08053 section 3), with LoRA.

Of every decoder block process r of T holds, with W (out, in) as in lora/layer.py,

    by rows (column parallel)       q, k, v, gate, up: W_r = W[rows of r]         y_r = x W_r'^T
    by columns (row parallel)       o, down: W_r = W[:, columns of r]             y = sum over r of x_r W_r'^T
    whole                           norms, embeddings, the output head; the bias of o and down counts on process 0

so that it computes whole heads, and of the MLP some columns. A 4-bit weight is quantized once, whole, and its
codes and 8-bit scales are sliced: the parts stand for the numbers of the whole, bit for bit. Quantized apart, the
offset of double quantization would be another in each part.

A (R, in) and B (out, R) of an adapter are whole on every process, which computes with its part of them:

    by rows       h = x A^T          y_r = x W_r^T + s h B_r^T               dB_r, zeros elsewhere; dA a summand
    by columns    h_r = x_r A_r^T    y = sum of x_r W_r^T + s h_r B^T        dA_r, zeros elsewhere; dB a summand

and therefore the sum of all processes' gradients is the gradient, of A and of B, in either kind
(training/loop.py).

What is exchanged, with N tokens, D hidden, c the bytes of the compute dtype; the two conjugate functions:

    enter    x -> x             backward: the sum of dx over the group      before q, k, v and before gate, up
    leave    y -> sum of y      backward: dy -> dy                          behind o and behind down

so two all-reduces of c N D in the forward pass of a block, and two in the backward pass, of which there is none
where nothing below wants a gradient. A recomputed block makes one more: torch leaves off before the last one,
whose sum nothing keeps.

With sequence parallelism (arXiv 2205.05198) what lies between, the norms and the residual stream, is divided by
tokens, ceil(length / T) of each row for a process, and then

    enter    own tokens -> all tokens: all-gather                  backward: reduce-scatter
    leave    all tokens' summands -> own tokens: reduce-scatter    backward: all-gather

A ring all-reduce is a reduce-scatter and an all-gather, so as much is sent. Kept for the backward pass, per token
and block: the inputs of two norms, c 2 D, become c 2 D / T, and that of a recomputed block, c D, c D / T. The
inputs of adapted layers, all tokens, stay.
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
from qlora.quant.parts import Part, cut_weight
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks

# ---- what is exchanged ------------------------------------------------------------------------------------


class _Summed(torch.autograd.Function):
    """leave: the sum over the group; the gradient is each process's own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        return _all_reduce(y, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


class _Shared(torch.autograd.Function):
    """enter: the same on every process; its gradient is the sum of what they find."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_reduce(dx, ctx.group), None


class _Gathered(torch.autograd.Function):
    """(B, own, D) -> (B, length, D), whose gradient is the sum of what the processes find (`is_summed`) or whole
    on each of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: GroupExchange, length: int, is_summed: bool) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.is_summed = exchange, is_summed
        return exchange.gather(x, length)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        exchange: GroupExchange = ctx.exchange
        return exchange.reduce_scatter(dx) if ctx.is_summed else exchange.own(dx), None, None, None


class _Scattered(torch.autograd.Function):
    """(B, length, D) -> (B, own, D): of the sum over the group (`is_summed`), or of what is the same on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: GroupExchange, is_summed: bool) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.length = exchange, x.shape[1]
        return exchange.reduce_scatter(x) if is_summed else exchange.own(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.exchange.gather(dy, ctx.length), None, None


def _all_reduce(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total


@dataclass(frozen=True)
class GroupExchange(Exchange):
    """What the processes of a tensor parallel group exchange in a block.

    Args:
        is_first, is_last: whether the block is the first or the last one, where tokens are divided and gathered.
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
        return _Shared.apply(y, self.ranks.tensor_group)

    def leave(self, o: Tensor) -> Tensor:
        if self.ranks.sequence_parallel:
            return _Scattered.apply(o, self, True)
        return _Summed.apply(o, self.ranks.tensor_group)

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
        """(B, length, D) summands -> (B, own, D) of their sum"""
        parts = self._parts(x)
        total = torch.empty_like(parts[0])
        torch.distributed.reduce_scatter(total, parts, group=self.ranks.tensor_group)
        return total

    def own(self, x: Tensor) -> Tensor:
        """(B, length, D) -> (B, own, D)"""
        return self._parts(x)[self.ranks.tensor_rank]

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Every process's tokens, the last ones' filled up with zeros."""
        size = -(-x.shape[1] // self.ranks.tensor_size)
        padded = F.pad(x, (0, 0, 0, size * self.ranks.tensor_size - x.shape[1]))
        return [part.contiguous() for part in padded.split(size, dim=1)]


# ---- cutting weights --------------------------------------------------------------------------------------


def split_of(layer: str, ranks: Ranks) -> Part | None:
    """The part of a layer, given by its qualified name, that a process holds; None: all of it."""
    axis = split_axis(layer)
    return None if axis is None else Part(axis, ranks.tensor_rank, ranks.tensor_size)


class WeightCut:
    """Takes a model's weights as they are loaded and gives back the part of each that this process keeps.

    The parts are copies: nothing holds the whole weights.

    Args:
        model: as for `load_base_model`; of it only the config is read.
    Attributes:
        samples: what stands in the base's fingerprint for each weight that was cut.
    Raises:
        InputError: a model whose layers do not divide (`check_widths`).
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
    """Let a network that was loaded with `cut` compute as one of its group, in place.

    Its `BaseInfo` then says how it is split.

    Raises:
        InputError: a block that model/block.py does not compute.
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
