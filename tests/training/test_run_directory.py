"""A run's directory: one run at a time, and the way back in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from qlora.system.errors import InputError
from qlora.training.checkpoint import checkpoint_path, list_checkpoints, read_state
from qlora.training.progress import Progress
from qlora.training.run_directory import RunDirectory
from tests.models import save_tiny_llama
from tests.training.outputs import begin, read_steps, step_line
from tests.training.test_checkpoint import adapted, stepped, write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter_model.safetensors"])
def test_a_directory_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(InputError, match=r"holds another run \(.*pass --resume auto"):
        RunDirectory(str(tmp_path), None, Accelerator(), {})


def test_an_adapter_without_checkpoints_is_not_trained_over(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("")
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        RunDirectory(str(tmp_path), "auto", Accelerator(), {})


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step_line(1)) + "\n")
    output = begin(tmp_path, adapted(tiny), "auto")
    assert output.progress == Progress() and read_steps(tmp_path) == []
    output.close()


def test_a_checkpoint_of_another_directory_does_not_touch_the_metrics_here(tiny: str, tmp_path: Path) -> None:
    model = adapted(tiny)
    path = checkpoint_path(tmp_path / "one", 5)
    write(path, model, stepped(model), Progress(5))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "metrics.jsonl").write_text(json.dumps(step_line(7)) + "\n")
    with pytest.raises(InputError, match="is not from --output-dir"):
        RunDirectory(str(tmp_path / "two"), str(path), Accelerator(), {})
    assert read_steps(tmp_path / "two") == [7]
    output = begin(tmp_path / "three", adapted(tiny), str(path))
    assert output.progress == Progress(5)
    output.close()


def test_two_runs_cannot_write_to_one_directory(tiny: str, tmp_path: Path) -> None:
    first = begin(tmp_path / "out", adapted(tiny))
    for resume in (None, "auto"):
        with pytest.raises(InputError, match=r"Another run is writing to --output-dir .*; wait for its end"):
            RunDirectory(str(tmp_path / "out"), resume, Accelerator(), {})
    first.log(step_line(1))
    first.close()
    begin(tmp_path / "out", adapted(tiny), "auto").close()  # the lock ends with the run


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunDirectory(str(tmp_path / "file" / "out"), None, Accelerator(), {})


def test_what_a_killed_run_left_half_written_is_removed(tiny: str, tmp_path: Path) -> None:
    model = adapted(tiny)
    write(checkpoint_path(tmp_path, 5), model, stepped(model), Progress(5))
    half = tmp_path / "checkpoints" / ".step-000006.123.tmp"
    half.mkdir()
    (half / "optimizer.safetensors").write_text("half")
    (tmp_path / ".adapter_model.safetensors.123.tmp").write_text("half")
    output = begin(tmp_path, adapted(tiny), "auto")
    assert output.progress.step == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert not list(tmp_path.glob(".*.123.tmp"))
    output.close()
    assert not list(tmp_path.glob(".*.tmp"))


def test_later_checkpoints_are_set_aside(tiny: str, tmp_path: Path) -> None:
    """After --resume with an older one, a kill and --resume auto must not lead back to the old future."""
    model = adapted(tiny)
    optimizer = stepped(model)
    for step in (2, 6, 1_000_000):
        write(checkpoint_path(tmp_path, step), model, optimizer, Progress(step))
    output = begin(tmp_path, adapted(tiny), str(checkpoint_path(tmp_path, 2)))
    output.close()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002"]
    for step in (6, 1_000_000):
        aside = tmp_path / "checkpoints" / f"aside-step-{step:06d}"
        assert read_state(aside)["progress"] == Progress(step)


def test_a_directory_that_is_refused_is_not_locked(tmp_path: Path) -> None:
    """The refused claim kept its lock until the process ended: the next run of the process was refused, too."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for _ in range(2):
        with pytest.raises(InputError, match="holds another run"):
            RunDirectory(str(tmp_path), None, Accelerator(), {})
    RunDirectory(str(tmp_path), "auto", Accelerator(), {}).release()
