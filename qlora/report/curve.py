"""Read metrics.jsonl and draw loss.png."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora.system.files import new_file


def smoothing_width(num_steps: int) -> int:
    """Number of steps in the mean of the smoothed loss."""
    return 1 + num_steps // 20


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines) of a metrics.jsonl, without skipped steps."""
    return part_metrics(json.loads(text) for text in path.read_text().splitlines())


def part_metrics(lines: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines); skipped steps are left out."""
    lines = list(lines)
    return [x for x in lines if x.get("loss") is not None], [x for x in lines if "eval_loss" in x]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw the loss curve of a metrics.jsonl as a .png."""
    from qlora.report.loss_figure import LossFigure

    with new_file(picture) as file:
        file.write_bytes(LossFigure(*read_metrics(metrics)).png())
