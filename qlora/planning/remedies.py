"""Changes to a run that may make it fit, each from its mildest to its strongest form.

Changes for many devices do not apply to a job on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qlora.config.devices import DevicesConfig
from qlora.config.parallel import ParallelConfig
from qlora.config.run import RunConfig

SMALLEST_RANK, SHORTEST_LENGTH, MOST_DEVICES = 8, 128, 1024  # limits of proposals
USUAL_NODE = 8  # devices


@dataclass(frozen=True)
class Job:
    """A run and its devices.

    Attributes:
        devices: None = a single device.
        tensor_parallel: possible numbers of devices that compute each layer together.
    """

    config: RunConfig
    devices: DevicesConfig | None = None
    device: str = "cpu"
    tensor_parallel: tuple[int, ...] = ()

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    def changed(self, part: str, **settings: Any) -> Job:
        """A copy with other settings in one part of its config."""
        return replace(
            self, config=replace(self.config, **{part: replace(getattr(self.config, part), **settings)})
        )


Changed: TypeAlias = Iterator[tuple[str, Job]]
Change: TypeAlias = Callable[[Job], Changed]


def _recompute(job: Job) -> Changed:
    yield "--gradient-checkpointing on", job.changed("loop", gradient_checkpointing="on")


def _offload(job: Job) -> Changed:
    """Keep what recomputed layers need in main memory; a CPU's process already computes there."""
    if job.device != "cpu" and not job.config.loop.offload_activations:
        flags = "--gradient-checkpointing on " * (job.config.loop.gradient_checkpointing != "on")
        changed = job.changed("loop", gradient_checkpointing="on", offload_activations=True)
        yield f"{flags}--offload-activations", changed


def _shard(job: Job) -> Changed:
    """Shard the base over the same devices, first within each node."""
    if job.devices is None or (job.devices.gpus or 1) == 1 or job.parallel.tensor_parallel > 1:
        return
    nodes, shard = job.devices.nodes, job.parallel.shard
    if shard == "none" and 1 < nodes < (job.devices.gpus or 1):
        yield "--shard hsdp", job.changed("parallel", shard="hsdp")
    if shard != "fsdp":
        yield "--shard fsdp", job.changed("parallel", shard="fsdp", shard_size=0)


def _smaller_batches(job: Job) -> Changed:
    """Smaller batches with more accumulation: the same examples per step, and so the same losses."""
    size, accumulated = job.config.loop.batch_size, job.config.loop.grad_accum
    for part in range(size - 1, 0, -1):
        if size % part == 0:
            steps = accumulated * (size // part)
            yield (
                f"--batch-size {part} --grad-accum {steps}",
                job.changed("loop", batch_size=part, grad_accum=steps),
            )


def _tensor_parallel(job: Job) -> Changed:
    """Tensor parallel, if neither base nor layers are split yet."""
    if job.devices is None or job.parallel.is_split:
        return
    within = (job.devices.gpus or 1) // job.devices.nodes
    for number in job.tensor_parallel:
        if within % number == 0:
            yield f"--tensor-parallel {number}", job.changed("parallel", tensor_parallel=number)


def _cpu_offload(job: Job) -> Changed:
    if job.devices is None or (job.devices.gpus or 1) == 1 or job.device == "cpu":
        return
    if job.parallel.tensor_parallel == 1 and not job.parallel.cpu_offload:
        shard = "fsdp" if job.parallel.shard == "none" else job.parallel.shard
        flags = "--cpu-offload" if job.parallel.shard != "none" else "--shard fsdp --cpu-offload"
        yield flags, job.changed("parallel", shard=shard, cpu_offload=True)


def _small_moments(job: Job) -> Changed:
    yield "--optim paged_adamw_8bit", job.changed("optimizer", optim="paged_adamw_8bit")


def _four_bits(job: Job) -> Changed:
    if not job.config.model.use_4bit:
        yield "--use-4bit", job.changed("model", use_4bit=True)


def _more_devices(job: Job) -> Changed:
    """Shard the base over more devices: first up to a full node, then whole nodes."""
    if job.devices is None or job.parallel.tensor_parallel > 1:
        return
    gpus, nodes = job.devices.gpus or 1, job.devices.nodes
    node = USUAL_NODE if nodes == 1 and gpus <= USUAL_NODE else gpus // nodes
    numbers = [(n, 1) for n in range(gpus + 1, node)] if nodes == 1 else []
    numbers += [(n, n // node) for n in range(node, MOST_DEVICES + 1, node) if n > gpus]
    split = job.changed("parallel", shard="fsdp", shard_size=0)
    for number, machines in numbers:
        flags = f"--gpus {number}" + (f" --nodes {machines}" if machines > 1 else "")
        flags += "" if job.parallel.shard == "fsdp" else " --shard fsdp"
        yield flags, replace(split, devices=replace(job.devices, gpus=number, nodes=machines))


def _lower_rank(job: Job) -> Changed:
    rank = job.config.lora.rank // 2
    while rank >= SMALLEST_RANK and not job.config.lora.use_adalora:
        yield f"--rank {rank}", job.changed("lora", rank=rank)
        rank //= 2


def _shorter_examples(job: Job) -> Changed:
    length = job.config.data.max_length // 2
    while length >= SHORTEST_LENGTH:
        yield f"--max-length {length}", job.changed("data", max_length=length)
        length //= 2


# Mildest first: those that do not affect results, then those that cost accuracy or devices.
CHANGES: tuple[Change, ...] = (
    _recompute, _shard, _smaller_batches, _offload, _tensor_parallel, _cpu_offload, _small_moments, _four_bits,
    _more_devices, _lower_rank, _shorter_examples,
)  # fmt: skip
