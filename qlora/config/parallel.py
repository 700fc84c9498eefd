"""Settings for splitting the base over several devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora.config.settings import Count, Positive, Settings
from qlora.system.errors import InputError


@dataclass
class ParallelConfig(Settings):
    """Several devices. Without these flags each holds the whole base and computes its own micro-batches."""

    shard: Literal["none", "fsdp", "hsdp"] = "none"
    """Split the base: over all devices (fsdp), or over those of a node, alike in every node (hsdp)."""
    shard_size: Count = 0
    """Devices that hold one copy of the base between them under hsdp; 0 = those of a node."""
    cpu_offload: bool = False
    """Keep each GPU's share of a split base in main memory; slower, and nearly free of GPU memory."""
    tensor_parallel: Positive = 1
    """Devices that compute each layer together, on the same micro-batches; 1 = every one by itself."""
    sequence_parallel: bool = False
    """With --tensor-parallel: what lies between the split layers (norms) is divided by tokens."""

    def check(self) -> None:
        if self.shard_size and self.shard != "hsdp":
            raise InputError(f"shard_size is {self.shard_size} without hsdp; pass --shard hsdp with it.")
        if self.cpu_offload and self.shard == "none":
            raise InputError("--cpu-offload is for a base that is split; pass --shard fsdp or hsdp with it.")
        if self.tensor_parallel > 1 and self.shard != "none":
            raise InputError(
                f"--tensor-parallel {self.tensor_parallel} and --shard {self.shard} are not combined; choose one."
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise InputError("--sequence-parallel goes with tensor parallel; pass --tensor-parallel N with it.")

    @property
    def is_split(self) -> bool:
        """Whether no device holds the whole base."""
        return self.shard != "none" or self.tensor_parallel > 1

    @property
    def flag(self) -> str:
        """The flag that splits the base, for messages."""
        return f"--shard {self.shard}" if self.shard != "none" else f"--tensor-parallel {self.tensor_parallel}"
