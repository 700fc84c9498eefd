"""Where this process stands among all of a run, and what they agree on outside of the model's passes.

    data parallel     every process has the whole base and its own micro-batches
    sharded           every process has a share of the base and its own micro-batches (shard.py)
    tensor parallel   groups of T neighbouring processes compute each layer together, on the same micro-batches;
                      the groups have different ones (tensor_parallel.py)

In all of them every process holds the whole adapter, and the gradients that the processes find are parts of one
sum: of other examples, or, within a group, of other rows and columns. Adding them over all processes is therefore
right in every mode (trainer.py), and saving, resuming on another number of processes, or in another mode, need
nothing gathered.

Where the base is split, a forward pass is itself a conversation: the processes go in lockstep, through the same
number of micro-batches, and one that fails ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qlora.config import ParallelConfig
from qlora.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """A process among all.

    Attributes:
        rank, size: among all processes.
        tensor_size: processes that compute each layer together; `tensor_group` is their process group.
        shard_mesh: over (processes that share one base) or (such groups, processes of one); None = not sharded.
        sequence_parallel, cpu_offload: as in `ParallelConfig`.
    """

    rank: int = 0
    size: int = 1
    tensor_size: int = 1
    tensor_group: Any = None
    shard_mesh: Any = None
    sequence_parallel: bool = False
    cpu_offload: bool = False

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def base_size(self) -> int:
        """Processes that hold a sharded base between them."""
        return 1 if self.shard_mesh is None else int(self.shard_mesh.size(self.shard_mesh.ndim - 1))

    @property
    def data_size(self) -> int:
        """How many different micro-batches are computed at a time."""
        return self.size // self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def is_split(self) -> bool:
        """Whether the base is split, so that all go in lockstep."""
        return self.shard_mesh is not None or self.tensor_size > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over different micro-batches, the same on all processes; a new tensor."""
        if self.size == 1:
            return values.clone()
        total = self._reduced(values, torch.distributed.ReduceOp.SUM)
        return total if self.tensor_size == 1 else (total / self.tensor_size).to(values.dtype)

    def sum_in_place(self, values: Tensor) -> None:
        """Make of `values` their sum over all processes, with no copy."""
        if self.size > 1:
            torch.distributed.all_reduce(values)

    def max(self, value: int, device: torch.device) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return value
        return int(self._reduced(torch.tensor(value, device=device), torch.distributed.ReduceOp.MAX).item())

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        result = values.clone()
        torch.distributed.all_reduce(result, operation)
        return result


def ranks_of(model: Any, accelerator: Accelerator | None) -> Ranks:
    """How the processes share the work on a model: as its base was split, else data parallel; None: one alone."""
    whole = Ranks() if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
    return getattr(model, "ranks", None) or whole


def arrange_ranks(config: ParallelConfig, accelerator: Accelerator) -> Ranks:
    """Make the groups that `config` asks for of the processes that there are; called on all.

    Raises:
        InputError: their number does not divide.
    """
    rank, size, device = accelerator.process_index, accelerator.num_processes, accelerator.device.type
    launch = "start it with accelerate launch --num_processes N or torchrun"
    if config.is_split and size == 1:
        raise InputError(f"{config.flag} splits the base over several processes, but this is one; {launch}.")
    if config.cpu_offload and device == "cpu":
        raise InputError(
            "--cpu-offload moves shares out of a GPU's memory, but this run has no GPU; leave it out."
        )
    if config.tensor_parallel > 1:
        tensor_size = config.tensor_parallel
        if size % tensor_size:
            raise InputError(
                f"--tensor-parallel {tensor_size} does not divide {size} processes; give a divisor of them."
            )
        mesh = torch.distributed.init_device_mesh(
            device, (size // tensor_size, tensor_size), mesh_dim_names=("data", "tensor")
        )
        return Ranks(rank, size, tensor_size, mesh.get_group("tensor"), None, config.sequence_parallel)
    if config.shard == "none":
        return Ranks(rank, size)
    shape: tuple[int, ...] = (size,)
    if config.shard == "hsdp":
        within = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if size % within:
            raise InputError(f"--shard-size {within} does not divide {size} processes; give a divisor of them.")
        shape = (size // within, within)
    mesh = torch.distributed.init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    return Ranks(rank, size, shard_mesh=mesh, cpu_offload=config.cpu_offload)


def sample_weight(name: str, weight: Tensor) -> bytes:
    """What stands for a weight in a base's fingerprint: its description and 64 of its values."""
    flat = weight.detach().reshape(-1)
    return describe_weight(name, weight.shape, weight.dtype) + as_bytes(flat[sampled(flat.numel())])


def describe_weight(name: str, shape: Sequence[int], dtype: torch.dtype) -> bytes:
    return f"{name} {tuple(shape)} {dtype}".encode()


def sampled(size: int) -> slice:
    """Which of a weight's flat values are sampled."""
    return slice(0, size, max(1, size // 64))


def as_bytes(values: Tensor) -> bytes:
    return bytes(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
