"""Trackers: TensorBoard read back, one that fails, missing packages. wandb and the others are not tried here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration

from qlora.system.errors import InputError
from qlora.training import trackers as tracking
from qlora.training.checkpoint import checkpoint_path
from qlora.training.progress import Progress
from qlora.training.trackers import Trackers, check_trackers, flatten, start_accelerator, start_trackers
from tests.models import save_tiny_llama
from tests.training.outputs import Output, step_line
from tests.training.test_checkpoint import adapted, stepped, write

SAMPLE = {"step": 2, "prompt": "Hi\nthere", "completion": "*Hello*", "expected": None}


class Recorder(GeneralTracker):
    """Keeps what it is given; fails at the calls named in `fails`."""

    requires_logging_directory = False

    def __init__(self, name: str = "recorder", fails: str = "") -> None:
        self.name, self.fails, self.calls = name, fails, []
        super().__init__()

    @property
    def tracker(self) -> Any:
        return self

    def _take(self, call: str, *arguments: Any) -> None:
        if call in self.fails.split():
            raise ConnectionError(f"no {call} at https://me:secret@host/x")
        self.calls.append((call, *arguments))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._take("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._take("log", step, values)

    def log_table(self, name: str, columns: Any = None, data: Any = None, step: int | None = None) -> None:
        self._take("log_table", step, data)

    def finish(self) -> None:
        self._take("finish")


def test_numbers_samples_and_the_end_reach_every_tracker() -> None:
    first, second = Recorder(), Recorder("other")
    trackers = Trackers([first, second])
    trackers.log({"step": 2, "loss": 1.5, "learning_rate": None, "stopped_early": True, "skipped": 1})
    trackers.log_samples([SAMPLE])
    trackers.finish()
    assert first.calls == second.calls == [
        ("log", 2, {"loss": 1.5, "skipped": 1}), ("log_table", 2, [["Hi\nthere", "*Hello*", ""]]), ("finish",),
    ]  # fmt: skip


def test_lines_of_a_run_are_logged() -> None:
    recorder, trainer = Recorder(), cast(Any, None)
    trackers = Trackers([recorder])
    trackers.after_step(trainer, {"step": 1, "loss": 1.5})
    trackers.after_evaluation(trainer, {"step": 1, "eval_loss": 1.25}, True)
    assert recorder.calls == [("log", 1, {"loss": 1.5}), ("log", 1, {"eval_loss": 1.25})]


@pytest.mark.parametrize("call", ["log", "log_table", "finish"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(call: str) -> None:
    bad, good, said = Recorder("bad", fails=call), Recorder("good"), []
    trackers = Trackers([bad, good], said.append)
    for step in (1, 2, 3):
        trackers.log({"step": step, "loss": 1.0})
        trackers.log_samples([SAMPLE])
    trackers.finish()
    assert len(said) == 1 and f"the tracker bad failed and is left out (ConnectionError: no {call}" in said[0]
    assert "secret" not in said[0]
    assert [c[0] for c in good.calls] == ["log", "log_table"] * 3 + ["finish"]


def test_what_is_missing_is_said_before_any_work() -> None:
    check_trackers([])
    check_trackers(["tensorboard", "all"])
    with pytest.raises(InputError, match=r"--report-to wandb needs a package; pip install wandb\."):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(InputError, match=r"pip install comet-ml\."):
        check_trackers(["comet_ml"])
    with pytest.raises(InputError, match=r"report_to names 'tensorbored'; give --report-to names of .*trackio"):
        check_trackers(["tensorbored"])


def test_every_tracker_with_a_name_for_a_run_is_one_of_accelerate_s() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert {*tracking.NAME_OF_RUN, *tracking.PACKAGES, "tensorboard"} <= set(LOGGER_TYPE_TO_CLASS)


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=[Recorder("bad", fails="config")])
    with pytest.raises(InputError, match=r"A tracker does not start \(bad: ConnectionError: no config"):
        start_trackers(accelerator, "project", "run", {})
    start_trackers(Accelerator(cpu=True), "project", "run", {})  # without trackers nothing happens


def test_settings_become_plain_values() -> None:
    settings = {"train": {"seed": 1, "resume": None, "layers": [1, 2]}, "debug": False}
    assert flatten(settings) == {"train.seed": 1, "train.layers": "[1, 2]", "debug": False}


def test_the_trackers_keep_files_in_the_output_directory(tmp_path: Path) -> None:
    accelerator = start_accelerator(["tensorboard"], tmp_path / "out")
    assert [str(name) for name in accelerator.log_with] == ["tensorboard"]
    assert Path(accelerator.logging_dir) == tmp_path / "out" / "logs" and not (tmp_path / "out").exists()
    assert start_accelerator([], tmp_path).log_with == []


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_a_resumed_run_without_gap_or_double(tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 3: steps 4 and 5 are there once, as done again."""
    tiny = str(save_tiny_llama(tmp_path / "model"))
    secret = "hf_" + "aB3" * 12

    def start(resume: str | None) -> Output:
        project = ProjectConfiguration(str(tmp_path), logging_dir=str(tmp_path / "out" / "logs"))
        accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_config=project)
        output = Output(tmp_path / "out", adapted(tiny), resume, run={"train": {"seed": 1, "key": secret}})
        directory = output.directory
        start_trackers(accelerator, "project", "out", directory.settings, directory.done)
        output.trackers = Trackers(accelerator.trackers)
        return output

    killed = start(None)
    for step in range(1, 6):
        killed.log(step_line(step))
    killed.write_samples([{**SAMPLE, "step": 3}])
    killed.directory.release()
    model = adapted(tiny)
    write(checkpoint_path(tmp_path / "out", 3), model, stepped(model), Progress(3, sampled=3))

    resumed = start("auto")
    for step in range(4, 7):
        resumed.log({**step_line(step), "loss": 100.0 + step})
    resumed.log({"step": 6, "eval_loss": 0.5})
    resumed.close()
    found = scalars(tmp_path / "out" / "logs" / "project")
    assert found["loss"] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 104.0), (5, 105.0), (6, 106.0),
    ]  # fmt: skip
    assert found["eval_loss"] == [(6, 0.5)] and found["tokens_per_second"][0] == (1, 1.0)
    content = b"".join(path.read_bytes() for path in (tmp_path / "out" / "logs").rglob("*") if path.is_file())
    assert b"    Hi\n    there" in content and b"train.seed" in content
    assert secret.encode() not in content and b"[redacted]" in content


def test_tensorboard_is_not_imported_without_being_asked_for() -> None:
    assert "qlora.training.trackers" in sys.modules
    source = Path(tracking.__file__).read_text()
    assert "import tensorboard" not in source and "\nfrom accelerate" not in source


def test_the_environment_does_not_divide_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate takes its own accumulation from there, and `backward` divides by it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    x = torch.ones(3, requires_grad=True)
    start_accelerator([], tmp_path).backward(x.sum())
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1]
