"""Settings of the training loop: length, batch size, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qlora.config.fields import size_in_bytes
from qlora.config.settings import Check, Count, Positive, Settings
from qlora.system.errors import InputError

Size = Annotated[str | None, Check("a size such as 4GiB or 800MB", lambda text: size_in_bytes(text) is not None)]


@dataclass
class LoopConfig(Settings):
    """Training loop."""

    max_steps: Count = 0
    """Stop after this many optimizer steps; 0 means --epochs decides."""
    epochs: Positive = 1
    """Passes over the data."""
    batch_size: Positive = 8
    """Examples per micro-batch and device; batch size x max length bounds its tokens."""
    grad_accum: Positive = 1
    """Micro-batches per optimizer step: batch size x grad accum x devices examples share a step."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass; auto: in as few layers as fit in the memory."""
    memory_budget: Size = None
    """Memory limit for --gradient-checkpointing auto: 4GiB, 3.5GB, 800MiB; default: the base plus half of the free
    memory."""
    max_skipped: Count = 3
    """Steps with a non-finite loss or gradient to skip before the run stops."""
    seed: Count = 42
    """Seeds the adapter, the data order, the split and the dropout."""
    offload_activations: bool = False
    """Keep the inputs of recomputed layers in main memory, on a CPU in a file in the output directory: for long
    sequences."""

    def check(self) -> None:
        if self.offload_activations and self.gradient_checkpointing == "off":
            raise InputError(
                "--offload-activations keeps the inputs of recomputed layers, and --gradient-checkpointing off "
                "recomputes none; leave one of them out."
            )

    @property
    def memory_budget_bytes(self) -> int | None:
        """--memory-budget in bytes; None where it is not given."""
        return size_in_bytes(self.memory_budget or "")
