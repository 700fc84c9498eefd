"""The processes of a run, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    def totals(self, values: Sequence[int], device: torch.device) -> list[int]:
        """The sum of each number over different micro-batches; the host waits for the others only."""
        if self.size == 1:
            return list(values)
        return self.sum(torch.tensor(values, device=device)).tolist()

    def max(self, value: int, device: torch.device) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return value
        return int(self._reduced(torch.tensor(value, device=device), torch.distributed.ReduceOp.MAX).item())

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        result = values.clone()
        torch.distributed.all_reduce(result, operation)
        return result
