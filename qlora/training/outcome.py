"""What a finished run has to say for itself: signs that it learned nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qlora.system.errors import TrainingStopped
from qlora.training.progress import Progress

FEWEST = 5  # losses from which a trend is read


def check_outcome(progress: Progress) -> None:
    """Check that a run made a step at all.

    Raises:
        TrainingStopped: every step was skipped.
    """
    if 0 < progress.step == progress.skipped:
        raise TrainingStopped(
            f"All {progress.step} steps were skipped, since none had a finite loss: the adapter learned nothing. "
            "Look at the examples in skipped/, and at the weights of the base."
        )


def doubts(losses: Sequence[float], target_counts: Sequence[int], vocab_size: int, warmup: int) -> list[str]:
    """Sentences about a finished run whose result is likely of no use; [] if nothing is suspicious.

    Args:
        losses: of the run's steps in order, in nats per token.
        target_counts: targets of each row.
        warmup: steps of the warm-up.
    """
    found = []
    if 0 < len(losses) <= warmup:
        found.append(
            f"The run ended within its warm-up ({len(losses)} of {warmup} steps), so the learning rate never "
            "reached --learning-rate: pass a smaller --warmup-steps, or train for longer."
        )
    if target_counts and max(target_counts) <= 1:
        found.append("No row has more than one token to learn: are the answers in the data empty?")
    if len(losses) >= FEWEST:
        count = max(1, len(losses) // 10)
        first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
        guess = math.log(vocab_size)
        if last >= guess:
            found.append(
                f"The loss ended at {last:.2f}, no better than guessing among {vocab_size} tokens ({guess:.2f}): "
                "look at the data and at --learning-rate."
            )
        elif last >= first:
            found.append(
                f"The loss did not fall ({first:.3f} at the start, {last:.3f} at the end): try another "
                "--learning-rate, or train for longer."
            )
    return found
