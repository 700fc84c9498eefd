"""Settings for a run's output and for resuming."""

from __future__ import annotations

from dataclasses import dataclass

from qlora.config.settings import Count, Settings
from qlora.system.errors import InputError


@dataclass
class SavingConfig(Settings):
    """Output, checkpoints and resuming."""

    output_dir: str = "out"
    """Receives adapter, metrics.jsonl, samples.jsonl, loss.png and checkpoints/."""
    save_every: Count = 0
    """Checkpoint every N steps; 0 = only at the end."""
    keep_last: Count = 0
    """Keep this many newest checkpoints, and the best by --best-metric; 0 = all."""
    load_best: bool = False
    """Leave the adapter of the best checkpoint in --output-dir at the end, instead of the last one."""
    resume: str | None = None
    """Continue from a checkpoint directory, or auto for the newest whole one in --output-dir."""
    force_resume: bool = False
    """Resume although model, data or settings differ from the checkpoint's; names what differs."""
    push_to_hub: str | None = None
    """Upload the adapter to this Hugging Face repository at the end, with a model card."""

    def check(self) -> None:
        if self.force_resume and self.resume is None:
            raise InputError("force_resume is given without resume; pass --resume auto or a checkpoint with it.")
