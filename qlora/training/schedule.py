"""Learning rate by step."""

from __future__ import annotations

import math
from collections.abc import Callable

WARMUP_STEPS = 10  # by default, in a run of 100 steps or more


def choose_warmup(asked: int | None, kept: int | None, total_steps: int) -> int:
    """Steps of the warm-up: as asked, else those of the run that is resumed, else at most a tenth of all steps."""
    chosen = kept if asked is None else asked
    return min(WARMUP_STEPS, total_steps // 10) if chosen is None else chosen


def build_schedule(name: str, peak: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the optimizer step (counted from 0).

    Rises linearly to `peak` over the warm-up (step 0 already moves), then stays (constant) or falls to zero
    just after the last step (linear, cosine). No state: resuming at step k needs only k.
    """

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if name == "linear":
            return peak * max(0.0, 1 - progress)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return peak

    return learning_rate
