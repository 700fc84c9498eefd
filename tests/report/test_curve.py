"""The display and the loss curve."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from qlora.report.curve import plot_loss, read_metrics
from qlora.training.display import Display, format_seconds

LINE = {"step": 1, "loss": 2.0, "tokens_per_second": 1234.5, "peak_memory_gib": 1.5}
SAMPLE = {"step": 100, "prompt": "Hi", "completion": "Hello", "expected": "Hello!"}


def test_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """About twenty lines for a run of any length, the last step always, evaluations always."""
    now = iter(range(1000))
    display = Display(total_steps=105, planned_gib=1.25, clock=lambda: next(now))
    for step in range(1, 106):
        display.show({**LINE, "step": step, "loss": 100.0 if step == 1 else 2.0})
    display.show({"step": 105, "eval_loss": 1.25})
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 24
    first = "step 5/105 loss 2.0000 (smoothed 21.6000) 1,234 tokens/s peak 1.50 GiB (planned 1.25) 1m 40s left"
    assert lines[0].split() == first.split()  # the first loss is one of five, and a second a step makes 100
    assert "(smoothed 2.0000)" in lines[1]  # the mean of six
    assert lines[-2].startswith("step   105/105") and lines[-2].endswith("(planned 1.25)")
    assert lines[-1].endswith("held-out loss 1.2500")


def test_the_time_left_is_measured_from_this_start_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed at step 90 of 100; the evaluation and the samples before its first step count for nothing."""
    now = [1000.0]
    display = Display(total_steps=100, start_step=90, clock=lambda: now[0])
    now[0] += 500  # an evaluation, which a resumed run may begin with
    display.show({"step": 90, "eval_loss": 1.0, "exact_match": 0.75})
    now[0] += 300
    display.show_samples([SAMPLE])
    for step, seconds in ((91, 20), (92, 40), (93, None), (94, 30)):
        now[0] += seconds or 10
        display.show({**LINE, "step": step, "loss": None if seconds is None else 1.0})
        if step == 92:
            assert display.seconds_left(92) == 30 * 8
    display.show({**LINE, "step": 95})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("held-out loss 1.0000  exact match 75.0%")
    assert lines[-1].startswith("step    95/100") and lines[-1].endswith("1m 40s left")  # 100 s for 5, 5 are left


def test_seconds_in_words() -> None:
    assert [format_seconds(s) for s in (0.4, 59.4, 59.6, 200, 3600 * 5 + 301)] == [
        "0s", "59s", "1m 00s", "3m 20s", "5h 05m",
    ]  # fmt: skip


def on_terminal(width: int) -> tuple[Display, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, soft_wrap=True, markup=False, emoji=False)
    return Display(200, 100, planned_gib=1.25, console=console, clock=iter(range(1000)).__next__), screen


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_on_a_terminal(width: int) -> None:
    """What was printed stays above the bar; the last frame says it all, within the width."""
    display, screen = on_terminal(width)
    display.show({"step": 100, "eval_loss": 1.25})
    display.show_samples([SAMPLE])
    for step in range(101, 151):
        display.show({**LINE, "step": step})
    display.say("a word")
    display.close()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in screen.getvalue().splitlines()]
    said = [line for line in lines if line and "━" not in line and "smoothed" not in line]
    assert [line.split()[0] for line in said] == ["step", "step", "completion", "expected", "a"]
    bars = [line.strip() for line in lines if "━" in line]
    assert bars[-1].endswith("150/200 50s left") and len(bars[-1]) <= width
    status = [line.strip() for line in lines if "smoothed" in line][-1]
    assert status == "loss 2.0000 (smoothed 2.0000)  1,234 tokens/s  peak 1.50 GiB (planned 1.25)"


def test_a_sample_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup, emoji names, escape sequences and line breaks of a model print as themselves, or not at all."""
    display = Display(total_steps=9)
    long = "word " * 100 + "end"
    texts = {"prompt": long, "completion": "[bold]a[/nope] :smile: \x1b[31m\nred\x07", "expected": None}
    display.show_samples([{"step": 0, **texts}])
    prompt, completion = capsys.readouterr().out.splitlines()
    assert prompt.startswith("step     0/9  sample 1  prompt      …") and prompt.endswith(" word end")
    assert len(prompt) < 240
    assert completion.split("completion")[1].strip() == "[bold]a[/nope] :smile: ?[31m red?"


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Display(total_steps=1, quiet=True).show(LINE)
    assert capsys.readouterr().out == ""


def test_the_curve_is_drawn_with_and_without_evaluations(tmp_path: Path) -> None:
    metrics, sizes = tmp_path / "metrics.jsonl", []
    lines: list[dict[str, float]] = [{**LINE, "step": step, "loss": 2.0 / step} for step in range(1, 20)]
    for extra in ([], [{"step": 0, "eval_loss": 2.0}, {"step": 10, "eval_loss": 0.3}]):
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines + extra))
        training, evaluations = read_metrics(metrics)
        assert (len(training), len(evaluations)) == (19, len(extra))
        plot_loss(metrics, tmp_path / "loss.png")
        content = (tmp_path / "loss.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(len(content))
    assert sizes[1] > sizes[0]  # the held-out curve and its legend entry are in the picture
