"""Estimate computation, communication and time of one optimizer step on many devices.

Letters as in planning/devices.py, and: D hidden, Q the queries' width, L tokens per example, V vocabulary, c bytes
of the compute dtype. Each rank gets n tokens per step in M micro-batches; all examples have length L and all
tokens are targets.

Each rank sends and receives per step, in rings (a ring of k ranks moves (k - 1) / k of the bytes to gather, and
twice that of the bytes to sum):

    gradients    once         2 (W - 1) / W x 4 P         in every mode: one fp32 sum over all ranks
    gathers      M times      (K - 1) / K x u, by unit    --shard: a block twice, but once below the first adapted
                                                          layer; embeddings and head once, twice if tied
    activations  by layer     2 (T - 1) / T x n D c       --tensor-parallel: 2 sums forward, 1 where the layer is
                                                          recomputed (torch stops before the last one), 2
                                                          where it is differentiated
    shares       M times      u / K, by unit              --cpu-offload: from main memory
    offloaded    2 M times    n D c / M, by layer         --offload-activations: the recomputed layers' inputs, to
                                                          main memory and back

The lowest differentiated layer needs no gradient of its input: one sum less. Sequence parallel uses all-gathers
and reduce-scatters of (T - 1) / T each instead: 4 forward, 3 recomputed, 4 backward, one less in the lowest layer,
one more for the last layer's output. (Gloo implements a reduce-scatter as an all-reduce and sends twice as much.)
A ring that spans nodes enters and leaves each node once, so the bytes that a rank sends also pass its node's link.

Operations per rank and token, with w weights and a adapter parameters in a layer:

    forward   2 w + 2 a + 2 Q L      attention, half of L^2 masked
    backward  2 w + 4 a + 5 Q L      no gradient of w; scores recomputed
    head      4 V D, or 6 V D if it trains

The forward pass covers all layers, again for recomputed ones; the backward pass covers those from the first
trained layer on. A rank has 1 / T of w and Q L. In a mixture of experts, w counts the experts that a token uses.

Gathers, shares and offloaded inputs overlap computing; sums do not. So

    max(computing, each of these) + sums  <=  time  <=  computing + all of these + sums

Not counted: latency (a ring of W ranks takes about 2 W steps), the optimizer, reading data, waiting for other
ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.model.attention import head_counts
from qlora.model.block import decoder_layers
from qlora.model.loss import head_layer
from qlora.planning.devices import Census, DeviceLayout
from qlora.quant.layers import logical_numel


@dataclass(frozen=True)
class Work:
    """The work of each rank in a step.

    Attributes:
        tokens: n, split into `micro_batches`, in examples of `length` tokens.
        recomputed, first_trained: recomputed decoder layers, and those below the first trained one.
        scored: tokens that only pass forward, in as many micro-batches: those of a reference in each step, and
            KTO's answers to other prompts.
    """

    tokens: int
    micro_batches: int
    length: int
    recomputed: int
    first_trained: int
    scored: int = 0


@dataclass(frozen=True)
class Traffic:
    """Communication of one kind in a step.

    Attributes:
        kind: "gradients", "gathers", "activations", "shares" or "offloaded".
        calls: collective operations, or copies.
        inside: bytes that each rank sends.
        between: bytes that each node sends to other nodes.
        hidden: whether it can overlap computing.
    """

    kind: str
    calls: int
    inside: int
    between: int
    hidden: bool = False

    def seconds(self, link_rate: float, node_link_rate: float) -> float:
        """Duration at these bytes per second of a rank and of a node."""
        return max(self.inside / link_rate, self.between / node_link_rate)


def step_traffic(layout: DeviceLayout, census: Census, work: Work, offloads: bool = False) -> list[Traffic]:
    """All communication in a step, by kind; `offloads`: --offload-activations."""

    def traffic(kind: str, calls: int, ring: int, size: int, hidden: bool = False) -> Traffic:
        sent = -(-(ring - 1) * size // ring)
        return Traffic(kind, calls, sent, sent if ring > layout.node_ranks else 0, hidden)

    found = []
    if layout.ranks > 1:
        found.append(traffic("gradients", 1, layout.ranks, 8 * census.trained))
    if layout.base_ranks > 1:
        again = int(work.scored > 0)
        gathers = [((unit.gathers + again) * work.micro_batches, unit) for unit in census.units if unit.tensors]
        calls, ranks = sum(count for count, _ in gathers), layout.base_ranks
        size = sum(count * unit.gathered(ranks) for count, unit in gathers)
        found.append(traffic("gathers", calls, ranks, size, hidden=True))
        if layout.cpu_offload:
            found.append(Traffic("shares", calls, size // ranks, 0, hidden=True))
    if layout.tensor_parallel > 1:
        differentiated = census.num_layers - work.first_trained
        wants_none = int(differentiated > 0)
        if layout.sequence_parallel:
            forward = 4 * census.num_layers + 1
            calls = forward + 3 * work.recomputed + 4 * differentiated - wants_none
        else:
            forward = 2 * census.num_layers
            calls = forward + work.recomputed + 2 * differentiated - wants_none
        size = (calls * work.tokens + forward * work.scored) * census.token_bytes
        size *= 1 if layout.sequence_parallel else 2
        calls += forward if work.scored else 0
        found.append(traffic("activations", calls * work.micro_batches, layout.tensor_parallel, size))
    if offloads and work.recomputed:
        calls = 2 * work.recomputed
        own = work.tokens // (layout.tensor_parallel if layout.sequence_parallel else 1)
        size = calls * own * census.token_bytes
        found.append(Traffic("offloaded", calls * work.micro_batches, size, 0, hidden=True))
    return found


def step_flops(model: Any, work: Work, layout: DeviceLayout) -> int:
    """Floating-point operations per rank and step; `model` is on the meta device, with adapters."""
    config, ranks = model.config, layout.tensor_parallel
    heads, _, head_dim = head_counts(config)
    scores = heads * head_dim * work.length
    total = only_forward = 0
    for number, layer in enumerate(decoder_layers(model)):
        w, a = _weights(layer, config)
        forward = (2 * w + 2 * scores) // ranks + 2 * a
        backward = (2 * w + 5 * scores) // ranks + 4 * a
        above = number - work.first_trained
        only_forward += forward
        total += forward * (2 if 0 <= above < work.recomputed else 1) + (backward if above >= 0 else 0)
    head = head_layer(model)
    if head is not None:
        total += (6 if head.weight.requires_grad else 4) * head.weight.numel()
        only_forward += 2 * head.weight.numel()
    return work.tokens * total + work.scored * only_forward


def _weights(layer: nn.Module, config: Any) -> tuple[int, int]:
    """(frozen weights of a layer that a token uses, trained parameters)."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    frozen = trained = 0.0
    for name, parameter in layer.named_parameters():
        size = logical_numel(parameter)
        if parameter.requires_grad:
            trained += size
        elif size > config.hidden_size and parameter.dim() > 1:
            frozen += size * (share if ".experts." in name else 1)
    return int(frozen), int(trained)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        computing: at the given rate; None: rate unknown.
        sending: by kind; empty if the rate is unknown.
        least, most: with full overlap of gathers and computing, and without any; None without both rates.
    """

    computing: float | None
    sending: dict[str, float]
    least: float | None
    most: float | None


def step_time(
    flops: int,
    traffic: Sequence[Traffic],
    rate: float | None = None,
    link_rate: float | None = None,
    node_link_rate: float | None = None,
) -> StepTime:
    """Bounds of the step time (see the module), from operations per second and bytes per second."""
    computing = None if rate is None else flops / rate
    sending = {}
    if link_rate is not None:
        sending = {t.kind: t.seconds(link_rate, node_link_rate or link_rate) for t in traffic}
    if computing is None or (traffic and not sending):
        return StepTime(computing, sending, None, None)
    behind = [sending[t.kind] for t in traffic if t.hidden]
    sums = sum(sending[t.kind] for t in traffic if not t.hidden)
    return StepTime(computing, sending, max([computing, *behind]) + sums, computing + sum(behind) + sums)


def measure_flops(dtype: torch.dtype, rows: int = 512, width: int = 1024) -> float:
    """Operations per second of this CPU, all threads, in a product of (rows, width) and (width, 4 width)."""
    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x @ weight.T
        seconds.append(time.perf_counter() - start)
    return 8 * rows * width**2 / statistics.median(seconds[1:])
