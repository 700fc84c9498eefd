"""Read metrics.jsonl and draw loss.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.system.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def smoothing_width(num_steps: int) -> int:
    """Over how many steps the smoothed loss is a mean."""
    return 1 + num_steps // 20


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines) of a metrics.jsonl; skipped steps are left out."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [x for x in lines if x.get("loss") is not None], [x for x in lines if "eval_loss" in x]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw the loss curve of a metrics.jsonl as a .png."""
    figure = draw_loss(*read_metrics(metrics))
    with new_file(picture) as file:
        figure.savefig(file, dpi=120, format="png")


def draw_loss(training: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> Figure:
    """Training loss (each step and smoothed) and held-out loss over optimizer steps.

    The figure is no window's: pyplot, whose backend is the user's choice, stays as it is.
    """
    from matplotlib.figure import Figure

    from qlora.report.charts import smooth

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [x["step"] for x in training], [x["loss"] for x in training]
    smoothed, width = smooth(losses)
    axes.plot(steps, losses, color="0.8", linewidth=1, label="training, each step")
    axes.plot(steps, smoothed, color="tab:blue", label=f"training, mean of {width} steps")
    if evaluations:
        held_out = [x["eval_loss"] for x in evaluations]
        axes.plot([x["step"] for x in evaluations], held_out, "o-", color="tab:orange", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
