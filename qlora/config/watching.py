"""Settings for watching a run: evaluation, samples, the best state, early stopping, trackers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from qlora.config.settings import Check, Count, Names, Positive, Settings, at_least


def seconds_in(text: str) -> float | None:
    """1h30m, 45s or 2d in seconds; None where it says no time."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match is None or not text:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


Time = Annotated[str | None, Check("a time such as 45s, 90m or 1h30m", lambda text: seconds_in(text) is not None)]


@dataclass
class WatchingConfig(Settings):
    """Evaluation, samples, early stopping and trackers."""

    eval_every: Count = 0
    """Evaluate every N steps and at the end; 0 = never."""
    sample_every: Count = 0
    """Answer a few fixed prompts every N steps and at the end; 0 = with each evaluation."""
    num_samples: Count = 3
    """Number of sample prompts; 0 = none."""
    sample_tokens: Positive = 64
    """Longest such answer, in tokens."""
    sample_prompts: str | None = None
    """Prompts to answer, any data file; by default those of the first held-out, else training examples."""
    best_metric: Literal["eval_loss", "exact_match", "accuracy"] = "eval_loss"
    """Metric that selects the best checkpoint: the held-out loss, the share of held-out answers that match, or of
    held-out preferences that the model shares."""
    score_examples: Count = 64
    """Held-out examples that exact_match answers, greedily and up to --max-new-tokens; 0 = all."""
    score_match: Literal["text", "json", "json_in_text", "gsm8k", "letter"] = "text"
    """How exact_match compares answers, as --match of python -m eval exact_match."""
    early_stopping_patience: Count = 0
    """End after so many evaluations in a row without a better --best-metric; 0 = never."""
    early_stopping_min_delta: Annotated[float, at_least(0)] = 0.0
    """Smallest improvement that counts."""
    stop_after: Time = None
    """Save and stop after this long: 45s, 90m, 3h or 1h30m."""
    report_to: Names = field(default_factory=list)
    """Trackers to log to, separated by commas: tensorboard, wandb, trackio, ..., or all that are installed."""
    project_name: str = "qlora"
    """The project of the run in trackers."""
    run_name: str | None = None
    """The run's name in trackers; by default that of --output-dir."""

    @property
    def stop_after_seconds(self) -> float | None:
        """--stop-after in seconds; None where it is not given."""
        return seconds_in(self.stop_after or "")
