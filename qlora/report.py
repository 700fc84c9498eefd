"""What a user sees of a run: a progress line while it lasts, a loss curve after it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from qlora.files import new_file


class _TwoLines(Progress):
    """A bar with its task's `status` below it: both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class RunDisplay:
    """Loss, tokens/s, peak memory and time left: a live bar on a terminal, about twenty lines elsewhere.

    Args:
        start_step: steps done before this start of the run.
        planned_gib: memory to set the peak against; 0 = no plan.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        planned_gib: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.quiet, self.clock = total_steps, quiet, clock
        self.plan = f" (planned {planned_gib:.2f})" if planned_gib else ""
        # What a model says may look like markup or an emoji's name.
        self.console = console or Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._every = max(1, round(total_steps / 20))
        self._losses: deque[float] = deque(maxlen=smoothing_width(total_steps))
        self._marks = deque([(start_step, clock())], maxlen=50)  # (step, time): evaluations and samples count too
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = _TwoLines(
                BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[left]}"), console=self.console,
                expand=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, left="", status="")
            self._bar.start()

    def show(self, line: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        if self.quiet:
            return
        step = line["step"]
        if "eval_loss" in line:
            score = f"  exact match {line['exact_match']:.1%}" if "exact_match" in line else ""
            self.say(f"step {step:>5}/{self.total_steps}  held-out loss {line['eval_loss']:.4f}{score}")
            self._begin_again()
            return
        self._marks.append((step, self.clock()))
        if line["loss"] is None:
            return  # a skipped step has been told of
        self._losses.append(line["loss"])
        status = f"loss {line['loss']:.4f}"
        if self._losses.maxlen != 1:
            status += f" (smoothed {sum(self._losses) / len(self._losses):.4f})"
        status += f"  {line['tokens_per_second']:,.0f} tokens/s  peak {line['peak_memory_gib']:.2f} GiB{self.plan}"
        left = f"{format_seconds(self.seconds_left(step))} left" if step < self.total_steps else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=left, status=status)
        elif step % self._every == 0 or step == self.total_steps:
            self.console.print(f"step {step:>5}/{self.total_steps}  {status}  {left}".rstrip())

    def seconds_left(self, step: int) -> float:
        """Time to the last step, by what the latest steps of this start took."""
        (first, started), (last, now) = self._marks[0], self._marks[-1]
        return (now - started) / max(1, last - first) * (self.total_steps - step)

    def show_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Print the samples of one step, three lines each."""
        for number, sample in enumerate(samples, start=1):
            start = f"step {sample['step']:>5}/{self.total_steps}  sample {number}"
            for name in ("prompt", "completion", "expected"):
                if sample[name] is not None:
                    self.say(f"{start}  {name:10}  {shorten(sample[name], keep_end=name == 'prompt')}")
                    start = " " * len(start)
        self._begin_again()

    def _begin_again(self) -> None:
        """Leave what came before the first step of this start out of the time that a step takes."""
        if len(self._marks) == 1:
            self._marks[0] = (self._marks[0][0], self.clock())

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def smoothing_width(num_steps: int) -> int:
    """Over how many steps the smoothed loss is a mean."""
    return 1 + num_steps // 20


def format_seconds(seconds: float) -> str:
    """45s, 3m 20s, 1h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"


def shorten(text: str, limit: int = 200, keep_end: bool = False) -> str:
    """Text on one line of at most `limit` characters, none of which a terminal would obey."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    if len(line) <= limit:
        return line
    return "…" + line[-limit + 1 :] if keep_end else line[: limit - 1] + "…"


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
