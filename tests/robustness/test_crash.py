"""The crash test in short, and that it would notice what it looks for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.adapters.peft_files import AdapterSnapshot
from qlora.training.checkpoint import checkpoint_path, save_checkpoint
from qlora.training.progress import Progress
from tests import fork_server
from tools import crash
from tools.crash import ROOT, Kill, Summary, compare_runs, newest_whole, run_crash_test

ADAPTER = "adapter_model.safetensors"


@pytest.mark.slow
def test_killed_runs_end_as_the_one_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash, "START", fork_server.Program)
    kinds = ["writing", "training", "start-up", "writing"]
    summary = run_crash_test(tmp_path, num_kills=len(kinds), seed=1, num_steps=16, kinds=kinds)
    assert summary.problems == [], "\n".join(summary.problems)
    assert len(summary.kills) == 4 and summary.runs >= 1
    assert summary.count("writing") >= 1 and max(kill.saved for kill in summary.kills) > 0


@pytest.mark.slow
def test_each_file_operation_from_the_last_checkpoint_on() -> None:
    """A kill before any of the last 14, from the checkpoint's renaming to the curve's."""
    command = [sys.executable, "-m", "tools.crash_points", "--steps", "2", "--last", "14"]
    done = fork_server.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "all identical to the reference", done.stdout + done.stderr
    assert "os.rename checkpoints/.step-000002" in done.stdout.splitlines()[0]


# ---- that it would notice ---------------------------------------------------------------------------------


def write_run(directory: Path) -> Path:
    """What a run of two steps leaves."""
    tensors = {"a": torch.arange(4.0)}
    for step in (1, 2):
        adapter = AdapterSnapshot(tensors, {}, {"base": "x"})
        save_checkpoint(checkpoint_path(directory, step), Progress(step), adapter, tensors, {})
    save_file(tensors, directory / ADAPTER)
    lines = [f'{{"step": {step}, "loss": 1.5, "tokens_per_second": {id(directory)}}}\n' for step in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    (directory / "samples.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return directory


def metrics(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        file = out / "metrics.jsonl"
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))

    return damage


def flip_a_bit(out: Path) -> None:
    tensors = load_file(out / ADAPTER)
    tensors["a"].view(torch.uint8)[0] ^= 1
    save_file(tensors, out / ADAPTER)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (metrics(lambda lines: lines[:1]), "metrics.jsonl:2 is None"),
        (metrics(lambda lines: [lines[0], *lines]), "metrics.jsonl:2 is"),
        (metrics(lambda lines: lines[::-1]), "metrics.jsonl:1 is"),
        (metrics(lambda lines: [*lines, '{"step": 3']), 'metrics.jsonl:3 is {"step": 3, not None'),
        (metrics(lambda lines: [lines[0], lines[1].replace("1.5", "1.25")]), "metrics.jsonl:2 is"),
        (flip_a_bit, f"{ADAPTER} differs"),
        (lambda out: (out / "samples.jsonl").write_text('{"step": 2}\n'), "samples.jsonl differs"),
        (lambda out: (out / ADAPTER).unlink(), f"lacks {ADAPTER}"),
        (lambda out: shutil.rmtree(checkpoint_path(out, 1)), "lacks checkpoints/step-000001/adapter_config.json"),
        (lambda out: (out / "checkpoints/.step-000003.17.tmp").mkdir(), "left behind checkpoints/.step-000003"),
        (lambda out: (out / f".{ADAPTER}.17.tmp").touch(), f"left behind .{ADAPTER}"),
        (lambda out: (out / "extra").touch(), "has extra, unlike the reference"),
        (lambda out: (checkpoint_path(out, 2) / "state.json").write_text("{}"), "is not readable"),
    ],
)
def test_a_difference_is_noticed(tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    out, reference = write_run(tmp_path / "run"), write_run(tmp_path / "reference")
    assert compare_runs(out, reference) == [], "speed may differ"
    damage(out)
    assert expected in compare_runs(out, reference)[0]


def test_a_damaged_checkpoint_is_not_counted_as_saved(tmp_path: Path) -> None:
    assert newest_whole(write_run(tmp_path)) == 2
    flip_a_bit(checkpoint_path(tmp_path, 2))
    assert newest_whole(tmp_path) == 1
    assert newest_whole(tmp_path / "nothing") == 0


def test_a_run_with_two_problems_is_one_lost_run() -> None:
    kills = [Kill("step", 1.0, 3, 2, []), Kill("writing", 2.0, 5, 4, [".step-000005.9.tmp"])]
    summary = Summary(kills, runs=3, problems=["run 2: a differs", "run 2: b differs"], seconds=90.0)
    assert summary.lost == 1
    assert str(summary) == (
        "2 kills (0 during start-up, 1 during steps, 1 while writing a checkpoint), 3 runs: 1 LOST OR DIFFERENT; "
        "1.5 minutes"
    )
