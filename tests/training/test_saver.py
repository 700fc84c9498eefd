"""The thread that writes checkpoints: whole states, the best of them, and a disk that fills up."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.adapters.peft_files import read_adapter
from qlora.lora.state import lora_state_dict
from qlora.lora.trainable import lora_parameters
from qlora.system.errors import StoppedOnRequest, TrainingStopped
from qlora.training import saver
from qlora.training.checkpoint import checkpoint_path, list_checkpoints, read_state
from qlora.training.lines import LinesFile
from qlora.training.progress import Progress
from qlora.training.saver import CheckpointWriter
from tests.models import save_tiny_llama
from tests.training.outputs import FullDisk, Output, begin, step_line
from tests.training.test_checkpoint import adapted, stepped, write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def test_an_adapter_that_learned_nothing_is_not_saved(tiny: str, tmp_path: Path) -> None:
    model = adapted(tiny)
    output = Output(tmp_path / "out", model)
    with pytest.raises(TrainingStopped, match="After 2 steps every lora_B is still zero"):
        output.save(Progress(3, skipped=1))
    assert not (tmp_path / "out" / "checkpoints").exists()
    for progress in (Progress(0), Progress(3, skipped=3)):  # nothing was to be learned yet
        output.save(progress)
    output.close()
    assert [read_state(path)["progress"].step for path in list_checkpoints(tmp_path / "out")] == [0, 3]


def test_what_is_written_is_the_state_at_the_time_of_saving(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held back until training has gone on; `save` must not wait for it."""
    go_on, real = threading.Event(), saver.save_checkpoint

    def slow(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(30)
        real(*arguments, **options)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    model = adapted(tiny)
    output = begin(tmp_path, model)
    expected = {k: v.clone() for k, v in lora_state_dict(model).items()}
    moments = {k: v.clone() for k, v in output.optimizer.state_tensors().items()}
    progress = Progress(1)
    output.save(progress)
    progress.step = 2
    for parameter in lora_parameters(model):
        parameter.grad = torch.ones(parameter.shape)
    output.optimizer.step(1e-2)
    assert list_checkpoints(tmp_path) == []
    go_on.set()
    output.close()

    for directory in (tmp_path, checkpoint_path(tmp_path, 1)):
        stored = read_adapter(directory).state
        assert all(torch.equal(expected[k], v) for k, v in stored.items()) and stored.keys() == expected.keys()
    other = adapted(tiny, seed=5)
    resumed = begin(tmp_path, other, "auto")
    assert resumed.progress == Progress(1)
    assert all(torch.equal(expected[k], v) for k, v in lora_state_dict(other).items())
    assert all(torch.equal(moments[k], v) for k, v in resumed.optimizer.state_tensors().items())
    resumed.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Call with True to make every checkpoint fail for want of space, with False to make room."""
    real, full = saver.save_checkpoint, [False]

    def save_checkpoint(*arguments: Any, **options: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(saver, "save_checkpoint", save_checkpoint)

    def set_full(value: bool) -> None:
        full[0] = value

    return set_full


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    tiny: str, tmp_path: Path, full_disk: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    output = begin(tmp_path, adapted(tiny))
    output.save(Progress(1))
    output.writer.wait()
    full_disk(True)
    output.save(Progress(2))
    output.writer.wait()
    full_disk(False)
    output.save(Progress(3))
    output.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000003"]
    said = capsys.readouterr().out
    assert said.count("could not be written") == 1 and "No space left on device" in said


def test_a_last_state_that_cannot_be_written_is_an_error(
    tiny: str, tmp_path: Path, full_disk: Callable[[bool], None]
) -> None:
    output = begin(tmp_path, adapted(tiny))
    output.save(Progress(1))
    output.writer.wait()
    full_disk(True)
    output.save(Progress(2))
    with pytest.raises(TrainingStopped, match=r"No space left.*--resume auto goes on from step-000001"):
        output.close()


def test_a_checkpoint_waits_for_the_metrics_before_it(tiny: str, tmp_path: Path) -> None:
    """Else a kill would lose lines that the resumed run does not write again."""
    output = begin(tmp_path, adapted(tiny))
    output.metrics._file = disk = FullDisk(tmp_path / "metrics.jsonl", 5)  # type: ignore[assignment]
    output.log(step_line(1))
    output.save(Progress(1))
    output.writer.wait()
    assert list_checkpoints(tmp_path) == []
    disk.room = 10**6
    output.metrics.close()
    output.writer.lines[0] = LinesFile(tmp_path / "metrics.jsonl", Progress(1))
    output.save(Progress(1))
    output.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]


def test_old_checkpoints_go_as_new_ones_come(tiny: str, tmp_path: Path) -> None:
    output = begin(tmp_path, adapted(tiny), keep_last=2)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None), (5, 2.5)):
        output.save(Progress(step, eval_loss=loss))
    output.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000005"]


def test_a_kill_before_pruning_leaves_no_old_checkpoint(tiny: str, tmp_path: Path) -> None:
    model = adapted(tiny)
    optimizer = stepped(model)
    for step in (1, 2, 3):
        write(checkpoint_path(tmp_path, step), model, optimizer, Progress(step))
    begin(tmp_path, adapted(tiny), "auto", keep_last=2).close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]


def save_three(directory: Path, tiny: str, **options: Any) -> tuple[Output, list[dict[str, torch.Tensor]]]:
    """A run whose second of three states is the best; also the adapters of its states."""
    model = adapted(tiny)
    output, states = begin(directory, model, **options), []
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        for parameter in lora_parameters(model):
            parameter.grad = torch.full(parameter.shape, 0.1 * step)
        output.optimizer.step(1e-2)
        output.progress.step = step
        output.progress.record_evaluation(loss)
        output.save(output.progress)
        states.append({key: tensor.clone() for key, tensor in lora_state_dict(model).items()})
    return output, states


@pytest.mark.parametrize(
    ("load_best", "stopped", "expected"), [(False, False, 2), (True, False, 1), (True, True, 2)]
)
def test_the_adapter_at_the_end(
    tiny: str, tmp_path: Path, load_best: bool, stopped: bool, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last state's, or with load_best the best one's; of a run that was stopped the last one's in any case."""
    output, states = save_three(tmp_path, tiny, load_best=load_best)
    if stopped:
        with pytest.raises(KeyboardInterrupt), output:
            raise KeyboardInterrupt
    else:
        with output:
            pass
    found = read_adapter(tmp_path).state
    same = [all(torch.equal(found[key], state[key]) for key in state) for state in states]
    assert same == [number == expected for number in range(3)]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"best checkpoint: {checkpoint_path(tmp_path, 2)} (held-out loss 1.0000")
    assert said.endswith("; its adapter is the run's)") == (load_best and not stopped)
    assert not list(tmp_path.rglob(".*.tmp"))
    begin(tmp_path, adapted(tiny), "auto").close()  # and it resumes from its last state
    assert output.progress.step == 3


@pytest.mark.parametrize("missing", [False, True])
def test_a_kill_between_the_last_checkpoint_and_its_adapter_is_made_good(
    tiny: str, tmp_path: Path, missing: bool
) -> None:
    """No step is left that would write the adapter anew: it is taken from the checkpoint."""
    output, _ = save_three(tmp_path, tiny)
    output.close()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        expected = (tmp_path / name).read_bytes()
        if missing:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes((checkpoint_path(tmp_path, 2) / name).read_bytes())
        begin(tmp_path, adapted(tiny), "auto").close()
        assert (tmp_path / name).read_bytes() == expected


def test_an_adapter_that_a_full_disk_does_not_take_at_the_start_comes_with_the_next_save(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_three(tmp_path, tiny)[0].close()
    with monkeypatch.context() as patch:
        patch.setattr(saver.shutil, "copyfile", fail)
        output = begin(tmp_path, adapted(tiny), "auto")
        with pytest.raises(TrainingStopped, match=r"No space left.*step-000003"):
            output.close()
        output = begin(tmp_path, adapted(tiny), "auto")
        output.progress.step = 4
        output.save(output.progress)
        output.close()
    assert read_state(checkpoint_path(tmp_path, 4))["progress"].step == 4


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_adapter(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, states = save_three(tmp_path, tiny, load_best=True)
    output.writer.wait()
    (checkpoint_path(tmp_path, 2) / "adapter_model.safetensors").write_bytes(b"")
    output.close()
    found = read_adapter(tmp_path).state
    assert all(torch.equal(found[key], tensor) for key, tensor in states[2].items())
    assert "the best checkpoint cannot be used: " in capsys.readouterr().out


def test_a_best_state_that_was_not_kept_is_said(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base was better than all that training made of it, and a step 0 is no checkpoint."""
    output, _ = save_three(tmp_path, tiny)
    output.progress.best_loss = 0.5
    output.close()
    assert capsys.readouterr().out.rstrip().endswith("; the best evaluation was of a state that was not saved)")


def test_secrets_are_written_nowhere(tiny: str, tmp_path: Path) -> None:
    secret = "hf_" + "aB3" * 12
    model = adapted(tiny)
    output = Output(tmp_path, model, base_model=f"https://user:{secret}@host/m", run={"model": secret})
    output.use(stepped(model))
    output.save(Progress(1))
    output.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and not any(secret.encode() in path.read_bytes() for path in files)


def test_an_end_that_fails_does_not_hide_why_training_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(_writer: CheckpointWriter, is_done: bool) -> None:
        assert not is_done
        raise MemoryError

    monkeypatch.setattr(CheckpointWriter, "close", close)
    for error, seen in (
        (TrainingStopped("It stopped."), "It stopped. MemoryError."),
        (RuntimeError("a bug"), "a bug"),
        (StoppedOnRequest("asked"), ""),
    ):
        with (
            pytest.raises((type(error), MemoryError)) as raised,
            CheckpointWriter.__new__(CheckpointWriter),
        ):
            raise error
        assert str(raised.value) == seen  # a request ends with the failure: its state is not written
