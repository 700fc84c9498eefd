"""The display and the loss curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.report import RunDisplay, plot_loss, read_metrics

LINE = {"step": 1, "loss": 2.0, "tokens_per_second": 1234.5, "peak_memory_gib": 1.5}


def test_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """About twenty lines for a run of any length, the last step always, evaluations always."""
    display = RunDisplay(total_steps=105)
    for step in range(1, 106):
        display.show({**LINE, "step": step})
    display.show({"step": 105, "eval_loss": 1.25})
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 24
    assert lines[0].split() == "step 5/105 loss 2.0000 1,234 tokens/s peak 1.50 GiB".split()
    assert lines[-2].startswith("step   105/105") and lines[-1].endswith("held-out loss 1.2500")


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    RunDisplay(total_steps=1, quiet=True).show(LINE)
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
