"""metrics.jsonl and samples.jsonl: no line lost or twice, and a disk that fills up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.training.checkpoint import checkpoint_path, list_checkpoints
from qlora.training.lines import LinesFile, Metrics
from qlora.training.progress import Progress
from tests.models import save_tiny_llama
from tests.training.outputs import FullDisk, begin, read_steps, step_line
from tests.training.test_checkpoint import adapted, stepped, write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def test_metrics_of_steps_done_again_are_dropped(tiny: str, tmp_path: Path) -> None:
    """A run killed after step 7, with half a line written, resumes from step 5."""
    model = adapted(tiny)
    write(checkpoint_path(tmp_path, 5), model, stepped(model), Progress(5))
    lines = [json.dumps(step_line(step)) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    output = begin(tmp_path, adapted(tiny), "auto")
    assert (
        output.directory.compute_dtype("auto") == "float32"
        and output.directory.compute_dtype("bfloat16") == "bfloat16"
    )
    assert output.progress == Progress(5)
    output.log(step_line(6))
    assert read_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    output.close()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run.json").read_text()) == {"rank": 4}


@pytest.mark.parametrize(("eval_loss", "kept"), [(None, 2), (0.5, 3)])
def test_an_evaluation_still_to_come_is_not_kept_from_before(
    tmp_path: Path, eval_loss: float | None, kept: int
) -> None:
    """Stopped after step 2 before its evaluation, resumed, evaluated, killed: it will be evaluated again."""
    path = tmp_path / "metrics.jsonl"
    lines = [step_line(1), step_line(2), {"step": 2, "eval_loss": 0.5}, step_line(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    LinesFile(path, Progress(2, eval_loss=eval_loss)).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:kept]


def test_an_evaluation_before_the_first_step_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"step": 0, "eval_loss": 0.5}
    path.write_text(json.dumps(line) + "\n" + json.dumps(step_line(1)) + "\n")
    LinesFile(path, Progress(0, eval_loss=0.5)).close()
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line]


@pytest.mark.parametrize("rubbish", ["", "null", "{}", '{"step": "1"}', "[" * 10, "\x00\x00", "\ud83d"])
def test_rubbish_between_lines_is_dropped(tmp_path: Path, rubbish: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f"{json.dumps(step_line(1))}\n{rubbish}\n{json.dumps(step_line(2))}\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    LinesFile(path, Progress(2)).close()
    assert read_steps(tmp_path) == [1, 2]


def test_lines_that_find_the_disk_full_wait_for_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = LinesFile(path, Progress())
    metrics.write(step_line(1))
    metrics._file = disk = FullDisk(path, 20)  # type: ignore[assignment]
    metrics.write(step_line(2))
    metrics.write(step_line(3))
    assert isinstance(metrics.flush(), OSError)
    disk.room = 10**6
    metrics.write(step_line(4))
    assert metrics.close() is None
    assert [json.loads(line) for line in path.read_text().splitlines()] == [step_line(n) for n in range(1, 5)]


def test_samples_that_will_be_taken_again_are_dropped(tiny: str, tmp_path: Path) -> None:
    """Resumed from step 5, whose samples were still to come: those of before a kill go, half a line too."""
    model = adapted(tiny)
    write(checkpoint_path(tmp_path, 5), model, stepped(model), Progress(5, sampled=3))
    samples = tmp_path / "samples.jsonl"
    lines = [{"step": step, "prompt": "Hi", "completion": f"{step}", "expected": None} for step in (0, 0, 3, 5, 6)]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "pro')
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step_line(5)) + "\n")
    output = begin(tmp_path, adapted(tiny), "auto")
    assert [json.loads(line) for line in samples.read_text().splitlines()] == lines[:3]
    again = [{**lines[3], "completion": "new"}, {**lines[3], "completion": "ünï\n"}]
    output.write_samples(again)
    output.close()
    assert [json.loads(line) for line in samples.read_text().splitlines()] == [*lines[:3], *again]


def test_a_checkpoint_waits_for_the_samples_before_it(tiny: str, tmp_path: Path) -> None:
    output = begin(tmp_path, adapted(tiny))
    output.write_samples([])
    output.samples._file = disk = FullDisk(tmp_path / "samples.jsonl", 5)  # type: ignore[assignment]
    output.write_samples([{"step": 1, "prompt": "Hi", "completion": "Hello", "expected": None}])
    output.save(Progress(1, sampled=1))
    output.writer.wait()
    assert list_checkpoints(tmp_path) == []
    disk.room = 10**6
    output.samples.close()
    output.writer.lines[1] = LinesFile(tmp_path / "samples.jsonl", Progress(1, sampled=1))
    output.save(Progress(1, sampled=1))
    output.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["completion"] == "Hello"


def test_steps_and_evaluations_are_written_as_they_come(tmp_path: Path) -> None:
    trainer: Any = None
    metrics = Metrics(LinesFile(tmp_path / "metrics.jsonl", Progress()))
    lines = [step_line(1), {"step": 1, "eval_loss": 0.5}, step_line(2)]
    metrics.after_step(trainer, lines[0])
    metrics.after_evaluation(trainer, lines[1], True)
    metrics.after_step(trainer, lines[2])
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == lines
