"""Settings of the training loop."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from qlora.config.fields import join_fields, size_in_bytes, split_names
from qlora.system.errors import InputError


@dataclass
class TrainConfig:
    """The loop."""

    output_dir: str = "out"
    """Receives adapter, metrics.jsonl, samples.jsonl, loss.png and checkpoints/."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 means --epochs decides."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 8
    """Examples per micro-batch and device; batch size x max length bounds its tokens."""
    grad_accum: int = 1
    """Micro-batches per optimizer step: batch size x grad accum x devices examples share a step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to zero as a cosine or a line, or constant."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the adapter's gradient to this norm; 0 = never."""
    optim: Literal["auto", "adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = "auto"
    """auto: paged_adamw_32bit where the device can page, else fused adamw."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass; auto: in as few layers as make the rest fit."""
    memory_budget: str | None = None
    """What auto makes the run fit: 4GiB, 3.5GB, 800MiB; by default its base and half of the free memory."""
    eval_every: int = 0
    """Evaluate every N steps and at the end; 0 = never."""
    sample_every: int = 0
    """Answer a few fixed prompts every N steps and at the end; 0 = with each evaluation."""
    num_samples: int = 3
    """How many prompts to answer; 0 = never any."""
    sample_tokens: int = 64
    """Longest such answer, in tokens."""
    sample_prompts: str | None = None
    """Prompts to answer, any data file; by default those of the first held-out, else training examples."""
    best_metric: Literal["eval_loss", "exact_match"] = "eval_loss"
    """What makes an evaluation the best: the held-out loss, or how many held-out answers come out as expected."""
    score_examples: int = 64
    """Held-out examples that exact_match answers, greedily and up to --max-new-tokens; 0 = all."""
    score_match: Literal["text", "json", "json_in_text", "gsm8k", "letter"] = "text"
    """How exact_match compares answers, as --match of python -m eval exact_match."""
    early_stopping_patience: int = 0
    """End after so many evaluations in a row without a better --best-metric; 0 = never."""
    early_stopping_min_delta: float = 0.0
    """Better means by more than this."""
    load_best: bool = False
    """Leave the adapter of the best checkpoint in --output-dir at the end, instead of the last one."""
    report_to: str = ""
    """Trackers to log to, separated by commas: tensorboard, wandb, trackio, ..., or all that are installed."""
    project_name: str = "qlora"
    """The project of the run in trackers."""
    run_name: str | None = None
    """The run's name in trackers; by default that of --output-dir."""
    save_every: int = 0
    """Checkpoint every N steps; 0 = only at the end."""
    keep_last: int = 0
    """Keep this many newest checkpoints, and the best by --best-metric; 0 = all."""
    resume: str | None = None
    """Continue from a checkpoint directory, or auto for the newest whole one in --output-dir."""
    force_resume: bool = False
    """Resume although model, data or settings differ from the checkpoint's; names what differs."""
    stop_after: str | None = None
    """Save and stop in time, as on SIGTERM: 45s, 90m, 3h or 1h30m after the start."""
    max_skipped: int = 3
    """Steps with a non-finite loss or gradient to skip before the run stops."""
    push_to_hub: str | None = None
    """Upload the adapter to this Hugging Face repository at the end, with a model card."""
    seed: int = 42
    """Seeds the adapter, the data order, the split and the dropout."""

    def __post_init__(self) -> None:
        join_fields(self)
        for name, low in (
            ("max_steps", 0), ("epochs", 1), ("batch_size", 1), ("grad_accum", 1), ("warmup_steps", 0),
            ("weight_decay", 0), ("max_grad_norm", 0), ("eval_every", 0), ("save_every", 0), ("keep_last", 0),
            ("max_skipped", 0), ("seed", 0), ("sample_every", 0), ("num_samples", 0), ("sample_tokens", 1),
            ("score_examples", 0), ("early_stopping_patience", 0), ("early_stopping_min_delta", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value < math.inf and not (name == "max_grad_norm" and value == math.inf):
                flag = name.replace("_", "-")
                raise InputError(f"{name} is {getattr(self, name)}; give --{flag} {low} or more.")
        if self.stop_after is not None and self.stop_after_seconds is None:
            raise InputError(
                f"stop_after is {self.stop_after!r}; give --stop-after a time such as 45s, 90m or 1h30m."
            )
        if self.memory_budget is not None and self.memory_budget_bytes is None:
            raise InputError(
                f"memory_budget is {self.memory_budget!r}; give --memory-budget a size such as 4GiB or 800MB."
            )
        if self.force_resume and self.resume is None:
            raise InputError("force_resume is given without resume; pass --resume auto or a checkpoint with it.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; give --learning-rate a number above 0.")

    @property
    def trackers(self) -> list[str]:
        """The names in --report-to, split and stripped."""
        return split_names(self.report_to)

    @property
    def keeps_best(self) -> bool:
        """Whether a setting needs the best state as a checkpoint, however often others are saved."""
        return self.load_best or self.early_stopping_patience > 0 or self.best_metric != "eval_loss"

    @property
    def stop_after_seconds(self) -> float | None:
        """--stop-after in seconds; None where it is not given or says no time."""
        match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.stop_after or "")
        if match is None or not self.stop_after:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    @property
    def memory_budget_bytes(self) -> int | None:
        """--memory-budget in bytes; None where it is not given or says no size."""
        return size_in_bytes(self.memory_budget or "")
