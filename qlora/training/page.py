"""Draw report.html during a run and at its end, and loss.png at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.report.curve import plot_loss
from qlora.report.live import LiveReport
from qlora.training.observer import Observer

if TYPE_CHECKING:
    from qlora.training.loop import Trainer


class Page(Observer):
    """Refreshes report.html; as a context manager it draws the last page and the loss curve on exit.

    Args:
        say: receives a sentence about a page or curve that could not be made.
    """

    def __init__(self, directory: Path, say: Callable[[str], object] = print) -> None:
        self.directory, self.say = directory, say
        self.live = LiveReport(directory, say)

    def __enter__(self) -> Page:
        return self

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.live.notice(line)

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self.live.notice(line)

    def __exit__(self, *_error: object) -> None:
        self.live.finish()
        try:
            plot_loss(self.directory / "metrics.jsonl", self.directory / "loss.png")
        except Exception as error:  # must not hide how the run ended
            self.say(f"loss.png could not be drawn ({error}); all else is saved")
