"""How a run lies on many devices, and what each then holds: arithmetic on shapes, nothing is started.

Letters: W ranks (processes, one a device), G of them on each node; K ranks hold one copy of the base between them;
T ranks compute each layer together; P numbers train. For each rank:

    adapters, gradients, optimizer    whole everywhere
    data parallel                     the base whole
    --shard fsdp, hsdp                of each frozen tensor of r rows ceil(r / K) rows: K is W under fsdp; under
                                      hsdp the ranks of a node, or --shard-size, and W / K ranks hold the same
    --tensor-parallel T               codes and 8-bit scales of q, k, v, o, gate, up, down: a T-th; the fp32 scales
                                      of those (a 2000th of the base), biases of o and down, and all else whole

A 4-bit weight's tensors are its codes (a row of 32 bytes for 64 weights), a scale for each row (a byte, or 4
without double quantization) and an fp32 scale for each 256 of these. Its tables and offset (a KiB) are left out.

A sharded base is gathered by units: the embeddings, each decoder block, what is left, and the head where it is a
matrix of its own. Gathered, a tensor of r rows has K ceil(r / K), and a unit of those takes u bytes. torch's FSDP2
receives a unit in one buffer, copies it out, and frees the buffer only after the next unit has been copied out:

    g = the largest, over the units in turn, of u(before) + 2 u

The unit with the head is there together with the logits; the others come and go without those, so that of g

    communication = the larger of u(head) and g - logits

Tensor parallel has the outputs that it sums twice, c N D bytes for N tokens, with sequence parallel three times.

With --cpu-offload the shares rest in main memory, and a unit's share, u / K, comes to the device to be sent.

The gradients are summed when activations, logits and workspace are gone. They are moved into one fp32 tensor, and
beside them this takes 4 P bytes, of which `communication` has what goes beyond the place of those three.
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
from qlora.parallel.divisibility import split_axis
from qlora.planning.memory import MemoryPlan, differentiated_layers
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """Which ranks there are and what they share: W, W / G nodes, and the flags; `arrange` makes one that can be.

    Attributes:
        ranks, nodes: W, and how many machines they are on.
        base_ranks: K, ranks that hold one copy of a sharded base; 1 = not sharded.
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
        """How many different micro-batches are computed at a time."""
        return self.ranks // self.tensor_parallel

    @property
    def sent(self) -> str:
        """What takes memory because it is sent, in words."""
        if self.base_ranks > 1:
            return "the most of: gathered pieces of the base; the sum of gradients"
        return f"the {'most of: outputs; the ' if self.tensor_parallel > 1 else ''}sum of gradients"

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


def layout_of(ranks: Ranks) -> Layout:
    """The layout of a run, as far as memory asks for it: on however many nodes."""
    return Layout(ranks.size, 1, ranks.base_size, ranks.tensor_size, ranks.sequence_parallel, ranks.cpu_offload)


def arrange(devices: DevicesConfig, parallel: ParallelConfig, device: str) -> Layout:
    """The layout that the flags ask for.

    Args:
        device: "cuda" or "cpu".
    Raises:
        InputError: numbers that do not divide, or nothing to divide by.
    """
    ranks, nodes, tensor = devices.gpus or 1, devices.nodes, parallel.tensor_parallel
    if ranks % nodes:
        raise InputError(f"--gpus {ranks} are not the same number on each of --nodes {nodes}; give a multiple.")
    if parallel.is_split and ranks == 1:
        raise InputError(f"{parallel.flag} splits the base over several devices; give --gpus their number.")
    if parallel.cpu_offload and device == "cpu":
        raise InputError("--cpu-offload moves shares out of a GPU's memory; leave it out with --device cpu.")
    if ranks % tensor:
        raise InputError(f"--tensor-parallel {tensor} does not divide --gpus {ranks}; give a divisor of them.")
    within = ranks // nodes
    base_ranks = {"none": 1, "fsdp": ranks, "hsdp": parallel.shard_size or within}[parallel.shard]
    if parallel.shard == "hsdp":
        if not parallel.shard_size and nodes == 1:
            raise InputError("--shard hsdp splits the base within a node; give --nodes, or --shard-size.")
        if base_ranks < 2 or ranks % base_ranks:
            raise InputError(
                f"--shard hsdp cannot split the base over {base_ranks} of {ranks} devices each time; give "
                "--shard-size a divisor of --gpus from 2 on."
            )
    for group, flag in ((tensor, "--tensor-parallel"), (base_ranks, "--shard-size")):
        if within % group and group % within:
            raise InputError(
                f"{flag} {group} on nodes of {within} devices would cut nodes in pieces; give a divisor or a "
                f"multiple of {within}."
            )
    return Layout(ranks, nodes, base_ranks, tensor, parallel.sequence_parallel, parallel.cpu_offload)


# ---- what a rank holds of the base ------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What is gathered at once.

    Attributes:
        kind: "embeddings", "block", "head" or "rest".
        tensors: (rows, bytes of a row) of each frozen tensor.
        gathers: times in a micro-batch.
    """

    kind: str
    tensors: tuple[tuple[int, int], ...]
    gathers: int = 1

    def share(self, ranks: int) -> int:
        """Bytes of each of `ranks` ranks, the padding of the last ones included."""
        return sum(-(-rows // ranks) * size for rows, size in self.tensors)

    def gathered(self, ranks: int) -> int:
        """Bytes of the whole, with its padding."""
        return ranks * self.share(ranks)


def stored_tensors(parameter: Tensor) -> list[tuple[int, int]]:
    """(rows, bytes of a row) of the tensors that a frozen parameter is stored in."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        rows = parameter.shape[0] if parameter.dim() else 1
        return [(rows, parameter.numel() * parameter.itemsize // max(1, rows))]
    blocks, scale = state.absmax.numel(), state.absmax.itemsize
    tensors = [(blocks, -(-parameter.numel() * parameter.itemsize // blocks)), (blocks, scale)]
    return tensors + ([(state.state2.absmax.numel(), 4)] if state.nested else [])


def split_units(model: Any, first_trained: int) -> list[Unit]:
    """What is gathered at once under --shard, in the order of the forward pass.

    A block is gathered for the forward and again for the backward pass, below the first that trains only for the
    forward; the head, and embeddings, for their one use; tied embeddings for both uses.

    Args:
        first_trained: number of decoder layers below the first that trains anything.
    """
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
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


def gathered_peak(units: Sequence[Unit], layout: Layout) -> int:
    """Bytes of gathered units at the worst moment, and of a share on its way from main memory."""
    ranks, peak, before = layout.base_ranks, 0, 0
    for unit in units:
        size = unit.gathered(ranks)
        peak = max(peak, before + 2 * size + (unit.share(ranks) if layout.cpu_offload else 0))
        before = size
    return peak


def tensor_parallel_base(model: nn.Module, ranks: int) -> int:
    """Bytes of the frozen base on each of `ranks` that compute each layer together."""
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
    """What of a model is counted once, for any number of ranks.

    Attributes:
        num_layers, first_trained: decoder layers, and those below the first that trains anything.
        units: what is gathered at once under --shard.
        trained: P.
        replaced: bytes of base parameters that an adapter's copies stand for; they stay whole on every rank.
        tensor_base: bytes of the rest of the base on each of T ranks.
        token_bytes: c D, of one token's activations between two layers.
    """

    num_layers: int
    first_trained: int
    units: tuple[Unit, ...]
    trained: int
    replaced: int
    tensor_base: int
    token_bytes: int


def measure_layout(model: Any, tensor_parallel: int = 1) -> Census:
    """Count a model, adapters in place: on the meta device, or as a run has loaded it.

    Args:
        tensor_parallel: T; 1 where the layers are split already.
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


def divide_plans(plans: Sequence[MemoryPlan], census: Census, layout: Layout, num_tokens: int) -> list[MemoryPlan]:
    """A rank's plans from those with the whole base (`plan_recomputing` with the layout's T).

    Args:
        plans: with 0, 1, ... layers recomputed.
        num_tokens: N, the most that a micro-batch holds.
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
    plans: Sequence[MemoryPlan], census: Census, layout: Layout, num_tokens: int
) -> list[MemoryPlan]:
    """A rank's plans with what is held to be sent or received, in the passes and where gradients are summed.

    Args:
        plans: with the base as the rank holds it.
        Others as `divide_plans`.
    """
    held = gathered = 0
    if layout.tensor_parallel > 1:
        held = num_tokens * census.token_bytes * (2 if layout.sequence_parallel else 1)  # one is in the workspace
    elif layout.base_ranks > 1:
        *_, head = census.units
        held = (head if head.tensors else census.units[0]).gathered(layout.base_ranks)
        gathered = gathered_peak(census.units, layout)
    summing = 4 * census.trained if layout.ranks > 1 else 0

    def communication(p: MemoryPlan) -> int:
        return max(held, gathered - p.logits, summing - p.activations - p.logits - p.workspace)

    return [replace(p, communication=communication(p)) for p in plans]
