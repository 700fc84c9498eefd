"""Show a run on a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from qlora.report.curve import smoothing_width
from qlora.training.observer import Observer

if TYPE_CHECKING:
    from qlora.training.loop import Trainer


class _TwoLines(Progress):
    """A bar with its task's `status` below it, for a terminal of 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class Display(Observer):
    """Shows loss, tokens/s, peak memory and time left: a live bar on a terminal, about twenty lines elsewhere.

    Args:
        start_step: steps done before this start of the run.
        planned_gib: planned memory, shown with the peak; 0 = no plan.
        clock: monotonic time in seconds.
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
        self.console = console or _make_console()
        self._every = max(1, round(total_steps / 20))
        self._losses: deque[float] = deque(maxlen=smoothing_width(total_steps))
        self._marks = deque([(start_step, clock())], maxlen=50)  # (step, time), including evaluations and samples
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = _TwoLines(
                BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[left]}"), console=self.console,
                expand=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, left="", status="")
            self._bar.start()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.show(line)

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self.show(line)

    def show(self, line: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl."""
        if self.quiet:
            return
        step = line["step"]
        if "eval_loss" in line:
            score = f"  exact match {line['exact_match']:.1%}" if "exact_match" in line else ""
            shown = f"held-out loss {line['eval_loss']:.4f}{_preferences(line, 'eval_')}{score}"
            self.say(f"step {step:>5}/{self.total_steps}  {shown}")
            self._begin_again()
            return
        self._marks.append((step, self.clock()))
        if line["loss"] is None:
            return  # a skipped step was already reported
        self._losses.append(line["loss"])
        status = f"loss {line['loss']:.4f}"
        if self._losses.maxlen != 1:
            status += f" (smoothed {sum(self._losses) / len(self._losses):.4f})"
        status += _preferences(line)
        status += f"  {line['tokens_per_second']:,.0f} tokens/s  peak {line['peak_memory_gib']:.2f} GiB{self.plan}"
        left = f"{format_seconds(self.seconds_left(step))} left" if step < self.total_steps else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=left, status=status)
        elif step % self._every == 0 or step == self.total_steps:
            self.console.print(f"step {step:>5}/{self.total_steps}  {status}  {left}".rstrip())

    def seconds_left(self, step: int) -> float:
        """Time to the last step, estimated from the latest steps since this start."""
        (first, started), (last, now) = self._marks[0], self._marks[-1]
        return (now - started) / max(1, last - first) * (self.total_steps - step)

    def show_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Print the samples of one step, three lines each."""
        for number, sample in enumerate(samples, start=1):
            start = f"step {sample['step']:>5}/{self.total_steps}  sample {number}"
            for name in ("prompt", "completion", "expected"):
                if sample[name] is not None:
                    self.say(f"{start}  {name:10}  {one_line(sample[name], keep_end=name == 'prompt')}")
                    start = " " * len(start)
        self._begin_again()

    def _begin_again(self) -> None:
        """Exclude the time before the first step of this start from the time per step."""
        if len(self._marks) == 1:
            self._marks[0] = (self._marks[0][0], self.clock())

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _preferences(line: dict[str, Any], prefix: str = "") -> str:
    """Accuracy and margin of a line, if it has them."""
    text = f"  accuracy {line[prefix + 'accuracy']:.0%}" if prefix + "accuracy" in line else ""
    return text + (f"  margin {line[prefix + 'margin']:.3f}" if prefix + "margin" in line else "")


def _make_console() -> Console:
    """A console without markup or emoji codes, since a model's text may look like either.

    A notebook gets plain lines: rich's live display needs another package there, and ipykernel's FORCE_COLOR would
    make it write escape codes.
    """
    plain: dict[str, Any] = dict(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if Console().is_jupyter:
        return Console(**plain, force_jupyter=False, force_terminal=False)
    return Console(**plain)


def format_seconds(seconds: float) -> str:
    """45s, 3m 20s, 1h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"


def one_line(text: str, limit: int = 200, keep_end: bool = False) -> str:
    """Text on one line of at most `limit` characters, without terminal control characters."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    if len(line) <= limit:
        return line
    return "…" + line[-limit + 1 :] if keep_end else line[: limit - 1] + "…"
