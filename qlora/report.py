"""What a user sees of a run: a progress line while it lasts, a loss curve after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora.files import new_file


class RunDisplay:
    """Loss, tokens/s, peak memory and time left: a live bar on a terminal, about twenty lines elsewhere."""

    def __init__(self, total_steps: int, start_step: int = 0, quiet: bool = False) -> None:
        self.total_steps, self.quiet = total_steps, quiet
        self.console = Console(soft_wrap=True, highlight=False)
        self._every = max(1, total_steps // 20)
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, status="")
            self._bar.start()

    def show(self, line: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        if self.quiet:
            return
        if "eval_loss" in line:
            self.console.print(f"step {line['step']:>5}/{self.total_steps}  held-out loss {line['eval_loss']:.4f}")
            return
        if line["loss"] is None:
            return  # a skipped step has been told of
        status = (
            f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s  "
            f"peak {line['peak_memory_gib']:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], status=status)
        elif line["step"] % self._every == 0 or line["step"] == self.total_steps:
            self.console.print(f"step {line['step']:>5}/{self.total_steps}  {status}")

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines) of a metrics.jsonl; skipped steps are left out."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [x for x in lines if x.get("loss") is not None], [x for x in lines if "eval_loss" in x]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training loss (each step and smoothed) and held-out loss over optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from qlora.charts import smooth

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
