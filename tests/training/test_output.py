"""A run's directory: one run at a time, whole files, metrics without gaps, and a disk that fills up."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qlora.adapters.peft_files import read_adapter
from qlora.config.lora import LoRAConfig
from qlora.data.example import IGNORE_INDEX
from qlora.lora.state import lora_state_dict
from qlora.lora.trainable import lora_parameters
from qlora.model.load import load_base_model
from qlora.system.errors import InputError, TrainingStopped
from qlora.training import output as output_module
from qlora.training.checkpoint import checkpoint_path, list_checkpoints, read_state
from qlora.training.fingerprint import base_fingerprint, data_fingerprint
from qlora.training.lines import MetricsFile
from qlora.training.optimizer import build_optimizer
from qlora.training.output import RunOutput
from qlora.training.progress import Progress
from tests.models import save_tiny_llama
from tests.training.test_checkpoint import SETTINGS, adapted, stepped, write
from tests.training.test_loop import make_examples

TIMING = {"tokens_per_second": 1.0, "peak_memory_gib": 1.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def begin(directory: Path, model: Any, resume: str | None = None, **options: Any) -> RunOutput:
    """A run's output over `model`, whose optimizer has made a step."""
    settings = options.pop("settings", SETTINGS)
    output = RunOutput(str(directory), "base", resume, Accelerator(), {"rank": 4}, **options)
    output.begin(model, LoRAConfig(rank=4), lambda: build_optimizer(lora_parameters(model), "adamw"), settings, 9)
    if resume is None:
        output.optimizer = stepped(model)
    return output


def step_line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, **TIMING}


def read_steps(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


# ---- whose directory it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter_model.safetensors"])
def test_a_directory_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(InputError, match=r"holds another run \(.*pass --resume auto"):
        RunOutput(str(tmp_path), "base", None, Accelerator(), {})


def test_an_adapter_without_checkpoints_is_not_trained_over(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("")
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        RunOutput(str(tmp_path), "base", "auto", Accelerator(), {})


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
        RunOutput(str(tmp_path / "two"), "base", str(path), Accelerator(), {})
    assert read_steps(tmp_path / "two") == [7]
    output = begin(tmp_path / "three", adapted(tiny), str(path))
    assert output.progress == Progress(5)
    output.close()


def test_two_runs_cannot_write_to_one_directory(tiny: str, tmp_path: Path) -> None:
    first = begin(tmp_path / "out", adapted(tiny))
    for resume in (None, "auto"):
        with pytest.raises(InputError, match=r"Another run is writing to --output-dir .*; wait for its end"):
            RunOutput(str(tmp_path / "out"), "base", resume, Accelerator(), {})
    first.log(step_line(1))
    first.close()
    begin(tmp_path / "out", adapted(tiny), "auto").close()  # the lock ends with the run


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunOutput(str(tmp_path / "file" / "out"), "base", None, Accelerator(), {})


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


# ---- metrics ----------------------------------------------------------------------------------------------


def test_metrics_of_steps_done_again_are_dropped(tiny: str, tmp_path: Path) -> None:
    """A run killed after step 7, with half a line written, resumes from step 5."""
    model = adapted(tiny)
    write(checkpoint_path(tmp_path, 5), model, stepped(model), Progress(5))
    lines = [json.dumps(step_line(step)) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    output = begin(tmp_path, adapted(tiny), "auto")
    assert output.compute_dtype("auto") == "float32" and output.compute_dtype("bfloat16") == "bfloat16"
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
    MetricsFile(path, Progress(2, eval_loss=eval_loss)).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:kept]


def test_an_evaluation_before_the_first_step_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"step": 0, "eval_loss": 0.5}
    path.write_text(json.dumps(line) + "\n" + json.dumps(step_line(1)) + "\n")
    MetricsFile(path, Progress(0, eval_loss=0.5)).close()
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line]


@pytest.mark.parametrize("rubbish", ["", "null", "{}", '{"step": "1"}', "[" * 10, "\x00\x00", "\ud83d"])
def test_rubbish_between_lines_is_dropped(tmp_path: Path, rubbish: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f"{json.dumps(step_line(1))}\n{rubbish}\n{json.dumps(step_line(2))}\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    MetricsFile(path, Progress(2)).close()
    assert read_steps(tmp_path) == [1, 2]


class FullDisk:
    """Stands in for a file on a disk that has `room` bytes left."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_lines_that_find_the_disk_full_wait_for_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, Progress())
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
    assert output._samples is not None
    output._samples._file = disk = FullDisk(tmp_path / "samples.jsonl", 5)  # type: ignore[assignment]
    output.write_samples([{"step": 1, "prompt": "Hi", "completion": "Hello", "expected": None}])
    output.save(Progress(1, sampled=1))
    output._finish_writing()
    assert list_checkpoints(tmp_path) == []
    disk.room = 10**6
    output._samples.close()
    output._samples = MetricsFile(tmp_path / "samples.jsonl", Progress(1, sampled=1))
    output.save(Progress(1, sampled=1))
    output.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["completion"] == "Hello"


# ---- checkpoints ------------------------------------------------------------------------------------------


def test_an_adapter_that_learned_nothing_is_not_saved(tiny: str, tmp_path: Path) -> None:
    model = adapted(tiny)
    output = RunOutput(str(tmp_path / "out"), "base", None, Accelerator(), {})
    make = lambda: build_optimizer(lora_parameters(model), "adamw")  # noqa: E731
    output.begin(model, LoRAConfig(rank=4), make, SETTINGS, total_steps=3)
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
    go_on, real = threading.Event(), output_module.save_checkpoint

    def slow(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(30)
        real(*arguments, **options)

    monkeypatch.setattr(output_module, "save_checkpoint", slow)
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
    real, full = output_module.save_checkpoint, [False]

    def save_checkpoint(*arguments: Any, **options: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(output_module, "save_checkpoint", save_checkpoint)

    def set_full(value: bool) -> None:
        full[0] = value

    return set_full


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    tiny: str, tmp_path: Path, full_disk: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    output = begin(tmp_path, adapted(tiny))
    output.save(Progress(1))
    output._finish_writing()
    full_disk(True)
    output.save(Progress(2))
    output._finish_writing()
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
    output._finish_writing()
    full_disk(True)
    output.save(Progress(2))
    with pytest.raises(TrainingStopped, match=r"No space left.*--resume auto goes on from step-000001"):
        output.close()


def test_a_checkpoint_waits_for_the_metrics_before_it(tiny: str, tmp_path: Path) -> None:
    """Else a kill would lose lines that the resumed run does not write again."""
    output = begin(tmp_path, adapted(tiny))
    output._metrics._file = disk = FullDisk(tmp_path / "metrics.jsonl", 5)  # type: ignore[assignment]
    output.log(step_line(1))
    output.save(Progress(1))
    output._finish_writing()
    assert list_checkpoints(tmp_path) == []
    disk.room = 10**6
    output._metrics.close()
    output._metrics = MetricsFile(tmp_path / "metrics.jsonl", Progress(1))
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


def save_three(directory: Path, tiny: str, **options: Any) -> tuple[RunOutput, list[dict[str, torch.Tensor]]]:
    """A run whose second of three states is the best; also the adapters of its states."""
    model = adapted(tiny)
    output, states = begin(directory, model, **options), []
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        for parameter in lora_parameters(model):
            parameter.grad = torch.full(parameter.shape, 0.1 * step)
        output.optimizer.step(1e-2)
        output.progress.step = step
        output.progress.judge(loss)
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
        patch.setattr(output_module.shutil, "copyfile", fail)
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
    output._finish_writing()
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
    output = RunOutput(str(tmp_path), f"https://user:{secret}@host/m", None, Accelerator(), {"model": secret})
    make = lambda: build_optimizer(lora_parameters(model), "adamw")  # noqa: E731
    output.begin(model, LoRAConfig(rank=4), make, SETTINGS, 9)
    output.optimizer = stepped(model)
    output.save(Progress(1))
    output.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and not any(secret.encode() in path.read_bytes() for path in files)


def test_a_skipped_step_is_kept_for_inspection(tiny: str, tmp_path: Path) -> None:
    output, window = begin(tmp_path, adapted(tiny)), make_examples(3)
    window[1].origin = "train.jsonl:17"
    assert output.keep_batch(12, window) == f"Its examples are in {tmp_path}/skipped/step-000012.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "skipped/step-000012.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rows] == ["", "train.jsonl:17", ""]
    for row, example in zip(rows, window, strict=True):
        assert row["input_ids"] == example.input_ids.tolist()
        assert [IGNORE_INDEX if t is None else t for t in row["targets"]] == example.targets.tolist()
    (tmp_path / "skipped").rename(tmp_path / "moved")
    (tmp_path / "skipped").write_text("in the way")
    assert "train.jsonl:17" in output.keep_batch(13, window)  # a failure to write names the rows at least
    output.close()


# ---- fingerprints -----------------------------------------------------------------------------------------


def test_the_data_fingerprint_sees_content_masks_and_order() -> None:
    examples = make_examples(4)
    same, reordered = data_fingerprint(make_examples(4)), data_fingerprint(examples[::-1])
    masked = make_examples(4)
    masked[0].targets[-1] = -100
    assert data_fingerprint(examples) == same
    assert len({same, reordered, data_fingerprint(masked)}) == 3


def test_the_base_fingerprint_sees_weights_and_quantization_but_not_the_adapter(tmp_path: Path) -> None:
    from qlora.quant.weight import QuantConfig

    one, other = (str(save_tiny_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    base = base_fingerprint(adapted(one, seed=1))
    assert base_fingerprint(adapted(one, seed=2)) == base
    assert base_fingerprint(load_base_model(one, compute_dtype="float32", cache=False)) != ""
    changed = {
        base_fingerprint(adapted(other)),
        base_fingerprint(load_base_model(one, quant=QuantConfig("fp4", True), cache=False)),
        base_fingerprint(load_base_model(one, quant=QuantConfig("nf4", False), cache=False)),
        base_fingerprint(load_base_model(one, use_4bit=False, cache=False)),
    }
    assert len(changed | {base}) == 5
