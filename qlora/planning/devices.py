"""Estimate what each of many devices holds in a run: arithmetic on shapes, no process is started.

Letters: W ranks (processes, one per device), G of them on each node; K ranks share one copy of the base; T ranks
compute each layer together; P parameters train. Each rank holds:

    adapters, gradients, optimizer    all
    data parallel                     the whole base
    --shard fsdp, hsdp                ceil(r / K) of the r rows of each frozen tensor. fsdp: K = W. hsdp: K is the
                                      number of ranks per node, or --shard-size; W / K ranks hold the same share
    --tensor-parallel T               1 / T of the codes and 8-bit scales of q, k, v, o, gate, up, down; all of
                                      their fp32 scales (1 / 2000 of the base), the biases of o and down, the rest

A 4-bit weight is stored as codes (a row of 32 bytes per 64 weights), one scale per row (1 byte, or 4 without
double quantization) and one fp32 scale per 256 of these. Its tables and offset (1 KiB) are ignored.

A sharded base is gathered in units: the embeddings, each decoder block, the rest, and the head if it is a separate
matrix. A gathered tensor of r rows has K ceil(r / K) rows; a unit takes u bytes. torch's FSDP2 receives a unit in
one buffer, copies it out, and frees the buffer only after copying out the next unit:

    g = max over the units of u(previous) + 2 u

The head's unit exists together with the logits, the other units without them. Beyond the logits this takes

    communication = max(u(head), g - logits)

Tensor parallel holds two copies of the outputs that it sums, c N D bytes for N tokens; sequence parallel three.

With --cpu-offload the shares stay in main memory; a unit's share, u / K, is copied to the device to be sent.

Gradients are summed after activations, logits and workspace are freed. They are copied into one fp32 tensor of 4 P
bytes; `communication` counts what exceeds the space of those three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from qlora.config.devices import DevicesConfig
from qlora.config.parallel import ParallelConfig
from qlora.lora.full_parameters import replaced_parameters
from qlora.model.base import base_info
from qlora.model.block import decoder_layers
from qlora.model.loss import head_layer
from qlora.parallel.divisibility import split_axis
from qlora.planning.memory import MemoryPlan, differentiated_layers
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks


@dataclass(frozen=True)
class DeviceLayout:
    """The ranks of a run and what they share; `arrange` makes a valid one.

    Attributes:
        ranks, nodes: W, and the number of machines.
        base_ranks: K, ranks that share one copy of a sharded base; 1 = not sharded.
        tensor_parallel: T.
    """

    ranks: int = 1
    nodes: int = 1
    base_ranks: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    cpu_offload: bool = False

    @property
    def node_ranks(self) -> int:
        """G, ranks on each node."""
        return self.ranks // self.nodes

    @property
    def data_parallel(self) -> int:
        """Number of different micro-batches computed at a time."""
        return self.ranks // self.tensor_parallel

    @property
    def sent(self) -> str:
        """Description of the memory that communication takes."""
        if self.base_ranks > 1:
            return "the larger of: gathered pieces of the base; the gradient sum"
        return f"the {'larger of: layer outputs; the ' if self.tensor_parallel > 1 else ''}gradient sum"

    def __str__(self) -> str:
        where = f"{self.ranks:,} devices" if self.ranks > 1 else "1 device"
        if self.nodes > 1:
            where += f" on {self.nodes:,} nodes of {self.node_ranks}"
        if self.tensor_parallel > 1:
            split = f"{self.tensor_parallel} compute each layer together"
            split += ", norms by tokens" if self.sequence_parallel else ""
            return f"{where}: {split}; {self.data_parallel:,} micro-batches at a time"
        if self.base_ranks > 1:
            copies = self.ranks // self.base_ranks
            split = f"the base split over {self.base_ranks:,}" + (f", {copies:,} times" if copies > 1 else "")
            return f"{where}: {split}" + (", its shares in main memory" if self.cpu_offload else "")
        return f"{where}, the whole base on each" if self.ranks > 1 else where


def layout_of(ranks: Ranks) -> DeviceLayout:
    """The layout of a run as far as memory depends on it: the number of nodes is left out."""
    return DeviceLayout(
        ranks.size, 1, ranks.base_size, ranks.tensor_size, ranks.sequence_parallel, ranks.cpu_offload
    )


def arrange(devices: DevicesConfig, parallel: ParallelConfig, device: str) -> DeviceLayout:
    """The layout that the flags describe.

    Args:
        device: "cuda" or "cpu".
    Raises:
        InputError: the numbers do not divide, or one is missing.
    """
    ranks, nodes, tensor = devices.gpus or 1, devices.nodes, parallel.tensor_parallel
    if ranks % nodes:
        raise InputError(f"--gpus {ranks} is not a multiple of --nodes {nodes}; give a multiple.")
    if parallel.is_split and ranks == 1:
        raise InputError(f"{parallel.flag} splits the base over several devices; pass their number with --gpus.")
    if parallel.cpu_offload and device == "cpu":
        raise InputError("--cpu-offload needs a GPU; leave it out with --device cpu.")
    if ranks % tensor:
        raise InputError(f"--tensor-parallel {tensor} does not divide --gpus {ranks}; give a divisor.")
    within = ranks // nodes
    base_ranks = {"none": 1, "fsdp": ranks, "hsdp": parallel.shard_size or within}[parallel.shard]
    if parallel.shard == "hsdp":
        if not parallel.shard_size and nodes == 1:
            raise InputError("--shard hsdp splits the base within a node; pass --nodes or --shard-size.")
        if base_ranks < 2 or ranks % base_ranks:
            raise InputError(
                f"--shard hsdp cannot split the base over groups of {base_ranks} of {ranks} devices; give "
                "--shard-size a divisor of --gpus, at least 2."
            )
    for group, flag in ((tensor, "--tensor-parallel"), (base_ranks, "--shard-size")):
        if within % group and group % within:
            raise InputError(
                f"{flag} {group} does not fit nodes of {within} devices; give a divisor or a multiple of {within}."
            )
    return DeviceLayout(ranks, nodes, base_ranks, tensor, parallel.sequence_parallel, parallel.cpu_offload)


# ---- what a rank holds of the base ------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Tensors that are gathered at once.

    Attributes:
        kind: "embeddings", "block", "head" or "rest".
        tensors: (rows, bytes per row) of each frozen tensor.
        gathers: number of gathers per micro-batch.
    """

    kind: str
    tensors: tuple[tuple[int, int], ...]
    gathers: int = 1

    def share(self, ranks: int) -> int:
        """Bytes per rank of `ranks`, with the padding of the last ones."""
        return sum(-(-rows // ranks) * size for rows, size in self.tensors)

    def gathered(self, ranks: int) -> int:
        """Bytes of the gathered unit, with padding."""
        return ranks * self.share(ranks)


def stored_tensors(parameter: Tensor) -> list[tuple[int, int]]:
    """(rows, bytes per row) of the tensors that store a frozen parameter."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        rows = parameter.shape[0] if parameter.dim() else 1
        return [(rows, parameter.numel() * parameter.itemsize // max(1, rows))]
    blocks, scale = state.absmax.numel(), state.absmax.itemsize
    tensors = [(blocks, -(-parameter.numel() * parameter.itemsize // blocks)), (blocks, scale)]
    return tensors + ([(state.state2.absmax.numel(), 4)] if state.nested else [])


def split_units(model: Any, first_trained: int) -> list[Unit]:
    """The units that --shard gathers, in the order of the forward pass.

    A block is gathered for the forward and again for the backward pass; below the first trained layer only for the
    forward pass. Head and embeddings are gathered once each, tied embeddings twice.

    Args:
        first_trained: number of decoder layers below the first trained one.
    """
    embeddings = model.get_input_embeddings()
    head = head_layer(model)
    tied = head is None or head.weight is embeddings.weight
    layers = decoder_layers(model)
    seen: set[int] = set()

    def unit(kind: str, module: nn.Module | None, gathers: int) -> Unit:
        chosen = [p for p in module.parameters() if not p.requires_grad and id(p) not in seen] if module else []
        seen.update(map(id, chosen))
        return Unit(kind, tuple(t for p in chosen for t in stored_tensors(p)), gathers)

    units = [unit("embeddings", embeddings, 2 if tied else 1)]
    for number, layer in enumerate(layers):
        units.append(unit("block", layer, 2 if number >= first_trained else 1))
    last = unit("head", None if tied else head, 1)
    return [*units, unit("rest", model, 2), last]


def gathered_peak(units: Sequence[Unit], layout: DeviceLayout) -> int:
    """Peak bytes of gathered units, plus a share on its way from main memory."""
    ranks, peak, before = layout.base_ranks, 0, 0
    for unit in units:
        size = unit.gathered(ranks)
        peak = max(peak, before + 2 * size + (unit.share(ranks) if layout.cpu_offload else 0))
        before = size
    return peak


def tensor_parallel_base(model: nn.Module, ranks: int) -> int:
    """Bytes of the frozen base per rank if `ranks` compute each layer together."""
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        layer, _, kind = name.replace(".base_layer", "").rpartition(".")
        axis = split_axis(layer)
        parts = [rows * size for rows, size in stored_tensors(parameter)]
        if axis == 0 or (axis == 1 and kind == "weight"):
            parts[:2] = [-(-part // ranks) for part in parts[:2]]
        total += sum(parts)
    return total


@dataclass(frozen=True)
class Census:
    """Sizes of a model that hold for any number of ranks.

    Attributes:
        num_layers, first_trained: decoder layers, and those below the first trained one.
        units: the units that --shard gathers.
        trained: P.
        replaced: bytes of base parameters replaced by an adapter's copies; every rank keeps them whole.
        tensor_base: bytes of the rest of the base on each of T ranks.
        token_bytes: c D, bytes of one token's activations between two layers.
    """

    num_layers: int
    first_trained: int
    units: tuple[Unit, ...]
    trained: int
    replaced: int
    tensor_base: int
    token_bytes: int


def measure_layout(model: Any, tensor_parallel: int = 1) -> Census:
    """Measure a model with its adapters, on the meta device or as loaded for a run.

    Args:
        tensor_parallel: T; 1 if the layers are already split.
    """
    num_layers = len(decoder_layers(model))
    first_trained = num_layers - len(differentiated_layers(model))
    replaced = replaced_parameters(model).values()
    return Census(
        num_layers,
        first_trained,
        tuple(split_units(model, first_trained)),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(rows * size for p in replaced for rows, size in stored_tensors(p)),
        tensor_parallel_base(model, tensor_parallel),
        base_info(model).compute_dtype.itemsize * model.config.hidden_size,
    )


def divide_plans(
    plans: Sequence[MemoryPlan], census: Census, layout: DeviceLayout, num_tokens: int
) -> list[MemoryPlan]:
    """Turn plans with the whole base (`plan_recomputing` with the layout's T) into plans of one rank.

    Args:
        plans: with 0, 1, ... layers recomputed.
        num_tokens: N, the maximum per micro-batch.
    """
    base = plans[0].base
    if layout.tensor_parallel > 1:
        base = census.replaced + census.tensor_base
    elif layout.base_ranks > 1:
        base = census.replaced
        if not layout.cpu_offload:
            base += sum(unit.share(layout.base_ranks) for unit in census.units)
    return add_communication([replace(p, base=base) for p in plans], census, layout, num_tokens)


def add_communication(
    plans: Sequence[MemoryPlan], census: Census, layout: DeviceLayout, num_tokens: int
) -> list[MemoryPlan]:
    """Add the memory for communication, during the passes and while gradients are summed, to a rank's plans.

    Args:
        plans: with the base as the rank holds it.
        census, layout, num_tokens: as for `divide_plans`.
    """
    held = gathered = 0
    if layout.tensor_parallel > 1:
        held = (
            num_tokens * census.token_bytes * (2 if layout.sequence_parallel else 1)
        )  # one copy is counted in the workspace
    elif layout.base_ranks > 1:
        *_, head = census.units
        held = (head if head.tensors else census.units[0]).gathered(layout.base_ranks)
        gathered = gathered_peak(census.units, layout)
    summing = 4 * census.trained if layout.ranks > 1 else 0

    def communication(p: MemoryPlan) -> int:
        return max(held, gathered - p.logits, summing - p.activations - p.logits - p.workspace)

    return [replace(p, communication=communication(p)) for p in plans]
