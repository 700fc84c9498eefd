"""What one optimizer step on many devices computes and sends, and the time that takes at given rates.

Letters as in planning/devices.py, and: D hidden, Q the queries' width, L tokens of an example, V vocabulary, c
bytes of the compute dtype; a step gives each rank n tokens in M micro-batches, all examples L long, all tokens
targets.

Sent by each rank in a step, and received by it, in rings (a ring of k ranks moves (k - 1) / k of what it gathers,
twice that of what it sums):

    gradients    once         2 (W - 1) / W x 4 P         in every mode: one fp32 sum over all ranks
    gathers      M times      (K - 1) / K x u, by unit    --shard: a block twice, below the first adapted layer
                                                          once; embeddings and head once, tied ones twice
    activations  by layer     2 (T - 1) / T x n D c       --tensor-parallel: 2 sums forward, 1 where the layer is
                                                          recomputed (torch leaves off before the last one), 2
                                                          where it is differentiated
    shares       M times      u / K, by unit              --cpu-offload: from main memory

The lowest differentiated layer wants no gradient of its input: one sum less. Sequence parallel has gatherings and
scattered sums of (T - 1) / T each instead: 4 forward, 3 recomputed, 4 back, one less in the lowest, one more for
the last layer's output. (Gloo makes a scattered sum of a whole one, and sends twice as much.) A ring that spans
nodes enters and leaves each of them once: what a rank sends passes that node's link to others, too.

Operations of each rank, for a token, with w weights and a adapter numbers in a layer:

    forward   2 w + 2 a + 2 Q L      scores and their use, a half of L^2 masked
    backward  2 w + 4 a + 5 Q L      no gradient of w; scores computed again
    head      4 V D, or 6 V D where it trains

over all layers, the backward pass over those from the first that trains, the forward pass again where recomputed.
Of w and Q L a rank has a T-th. Of a mixture of experts w has the experts that a token meets.

Gathers and shares of the next unit travel while one computes; sums wait for what they sum. So

    max(computing, gathers, shares) + sums  <=  time  <=  computing + gathers + shares + sums

Not counted: latency (a ring of W ranks takes some 2 W steps), the optimizer, reading data, waiting for others.
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
from qlora.planning.devices import Census, Layout
from qlora.quant.layers import logical_numel


@dataclass(frozen=True)
class Work:
    """What each rank is given in a step.

    Attributes:
        tokens: n, in `micro_batches` of them, in examples of `length`.
        recomputed, first_trained: decoder layers that are recomputed, and that lie below the first that trains.
    """

    tokens: int
    micro_batches: int
    length: int
    recomputed: int
    first_trained: int


@dataclass(frozen=True)
class Traffic:
    """What the ranks send in a step.

    Attributes:
        kind: "gradients", "gathers", "activations" or "shares".
        calls: collective operations, or copies.
        inside: bytes that each rank sends.
        between: bytes that each node sends to others.
        hidden: whether it can travel while something is computed.
    """

    kind: str
    calls: int
    inside: int
    between: int
    hidden: bool = False

    def seconds(self, link_rate: float, node_link_rate: float) -> float:
        """At these bytes a second of a rank and of a node."""
        return max(self.inside / link_rate, self.between / node_link_rate)


def step_traffic(layout: Layout, census: Census, work: Work) -> list[Traffic]:
    """All that travels in a step, by kind."""

    def traffic(kind: str, calls: int, ring: int, size: int, hidden: bool = False) -> Traffic:
        sent = -(-(ring - 1) * size // ring)
        return Traffic(kind, calls, sent, sent if ring > layout.node_ranks else 0, hidden)

    found = []
    if layout.ranks > 1:
        found.append(traffic("gradients", 1, layout.ranks, 8 * census.trained))
    if layout.base_ranks > 1:
        gathers = [(unit.gathers * work.micro_batches, unit) for unit in census.units if unit.tensors]
        calls, ranks = sum(count for count, _ in gathers), layout.base_ranks
        size = sum(count * unit.gathered(ranks) for count, unit in gathers)
        found.append(traffic("gathers", calls, ranks, size, hidden=True))
        if layout.cpu_offload:
            found.append(Traffic("shares", calls, size // ranks, 0, hidden=True))
    if layout.tensor_parallel > 1:
        differentiated = census.num_layers - work.first_trained
        wants_none = int(differentiated > 0)
        if layout.sequence_parallel:
            calls = 4 * census.num_layers + 3 * work.recomputed + 4 * differentiated - wants_none + 1
        else:
            calls = 2 * census.num_layers + work.recomputed + 2 * differentiated - wants_none
        size = calls * work.tokens * census.token_bytes * (1 if layout.sequence_parallel else 2)
        found.append(traffic("activations", calls * work.micro_batches, layout.tensor_parallel, size))
    return found


def step_flops(model: Any, work: Work, layout: Layout) -> int:
    """Floating-point operations of each rank in a step; `model` on the meta device, adapters in place."""
    config, ranks = model.config, layout.tensor_parallel
    heads, _, head_dim = head_counts(config)
    scores = heads * head_dim * work.length
    total = 0
    for number, layer in enumerate(decoder_layers(model)):
        w, a = _weights(layer, config)
        forward = (2 * w + 2 * scores) // ranks + 2 * a
        backward = (2 * w + 5 * scores) // ranks + 4 * a
        above = number - work.first_trained
        total += forward * (2 if 0 <= above < work.recomputed else 1) + (backward if above >= 0 else 0)
    head = model.get_output_embeddings()
    if head is not None:
        total += (6 if head.weight.requires_grad else 4) * head.weight.numel()
    return work.tokens * total


def _weights(layer: nn.Module, config: Any) -> tuple[int, int]:
    """(numbers of a layer's frozen matrices that a token meets, numbers that train)."""
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
        computing: at the given rate; None: no rate is known.
        sending: by kind; empty where no rate is known.
        least, most: with gathers wholly behind computing, and with one after another; None without both rates.
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
    """The time of a step by the module's two bounds, from operations a second and bytes a second."""
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
    """Operations a second of this CPU, all threads, in a product of (rows, width) and (width, 4 width)."""
    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x @ weight.T
        seconds.append(time.perf_counter() - start)
    return 8 * rows * width**2 / statistics.median(seconds[1:])
