"""Read metrics.jsonl and draw loss.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora.system.files import new_file


def smoothing_width(num_steps: int) -> int:
    """Number of steps in the mean of the smoothed loss."""
    return 1 + num_steps // 20


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines) of a metrics.jsonl, without skipped steps."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [x for x in lines if x.get("loss") is not None], [x for x in lines if "eval_loss" in x]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Plot training loss (each step and smoothed) and held-out loss over optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from qlora.report.charts import smooth

    training, evaluations = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
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
    with new_file(picture) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
