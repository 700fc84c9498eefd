"""Observers of a run. Everything except the step itself attaches to the loop through these four calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.training.loop import Trainer


class Observer:
    """Override what you need; every call does nothing by default.

    The trainer calls its observers in list order on every process, so a call may use collectives if every process
    makes the same ones. `trainer.progress` says where the run is, `trainer.model` is the model in training mode;
    leave both as they were found.

        class StopWhenGood(Observer):
            def after_step(self, trainer, line):
                self.loss = line["loss"]

            def before_step(self, trainer):
                return "the loss is low enough" if self.loss < 0.1 else None
    """

    def before_step(self, trainer: Trainer) -> str | None:
        """Called between two steps, before the first and after the last.

        Returns:
            Why to stop the run here, to be resumed later; None: no reason. One process's reason is enough. To end
            the run here as if its last step were done, set `trainer.is_enough`.
        """

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Called after a step; `line` is its line of metrics.jsonl (a skipped step's loss is None)."""

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        """Called after an evaluation of the held-out data; `line` is its line of metrics.jsonl."""

    def at_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Called when the loop has ended: normally (None), on request (StoppedOnRequest) or by an error."""


class Stop(Observer):
    """Forwards a request to stop: from a signal, a time limit (`StopRequest`), or elsewhere.

    Args:
        request: why the run should stop now, or None.
    """

    def __init__(self, request: Any) -> None:
        self.request = request

    def before_step(self, trainer: Trainer) -> str | None:
        reason: str | None = self.request()
        return reason
