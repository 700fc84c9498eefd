"""How far a run has come, and whether its last evaluation is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done, skipped ones included.
        skipped: how many of these were skipped because their loss was not finite.
        eval_loss: loss of exactly this state, if it was evaluated.
        score: share of held-out answers that matched at that evaluation, or of preferences shared, if it decides.
        best_loss, best_score: of the best evaluation so far: the highest score, and at equal scores, or without
            them, the lowest loss.
        reference: the score, or without one the loss below zero, from which patience counts (`record_evaluation`).
        stale: evaluations since the reference.
        sampled: the last step whose samples are written; -1 = none.
    """

    step: int = 0
    skipped: int = 0
    eval_loss: float | None = None
    best_loss: float | None = None
    score: float | None = None
    best_score: float | None = None
    reference: float | None = None
    stale: int = 0
    sampled: int = -1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("step", "skipped", "stale", "sampled"):
                if type(value) is not int or value < (-1 if name == "sampled" else 0):
                    raise ValueError(f"{name} is {value!r}")
            elif value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}")

    def record_evaluation(self, eval_loss: float, score: float | None = None, min_delta: float = 0.0) -> bool:
        """Record an evaluation of this state.

        Args:
            min_delta: patience restarts if the score, or without one the loss, improves by more than this.
        Returns:
            whether it is the best so far.
        """
        self.eval_loss, self.score = eval_loss, score
        if (self.best_score is None) != (score is None):  # the run was resumed with another metric
            self.best_loss = self.reference = None
        is_best = self.best_loss is None or badness(eval_loss, score) < badness(self.best_loss, self.best_score)
        if is_best:
            self.best_loss, self.best_score = eval_loss, score
        quality = -eval_loss if score is None else score
        if self.reference is None or quality > self.reference + min_delta:
            self.reference, self.stale = quality, 0
        else:
            self.stale += 1
        return is_best


def badness(eval_loss: float | None, score: float | None) -> tuple[float, float]:
    """Sort key of evaluations, best first: by score if there are scores, then by loss."""
    return (0.0 if score is None else -score), (math.inf if eval_loss is None else eval_loss)
