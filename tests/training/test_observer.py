"""The hook interface: who is told what and when, who may stop a run, and what a failing observer may not hide."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from qlora.system.errors import StoppedOnRequest, TrainingStopped
from qlora.system.signals import StopRequest
from qlora.training import loop
from qlora.training.display import Display
from qlora.training.held_out import HeldOut
from qlora.training.loop import Limits, Trainer, TrainingData, is_lost_peer
from qlora.training.observer import Observer, Stop
from qlora.training.page import Page
from qlora.training.progress import Progress
from qlora.training.samples import Samples
from qlora.training.saver import Saver
from tests.models import save_tiny_llama
from tests.pages import Page as Html
from tests.pages import train_line, write_run
from tests.training.test_loop import Accelerator, adapted, build_optimizer, lora_parameters, make_examples

NOBODY = cast(Any, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


class Recorder(Observer):
    """Keeps the calls; stops the run, or fails, where it is told to."""

    def __init__(self, stop_at: int = -1, fails: str = "") -> None:
        self.calls: list[Any] = []
        self.stop_at, self.fails = stop_at, fails

    def _take(self, call: str, value: Any) -> None:
        self.calls.append((call, value))
        if call == self.fails:
            raise ValueError(f"no {call}")

    def before_step(self, trainer: Trainer) -> str | None:
        self._take("before", trainer.progress.step)
        return "enough" if trainer.progress.step == self.stop_at else None

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        assert trainer.progress.step == line["step"]
        self._take("step", line["step"])

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        assert is_best or line["step"]  # the first is always the best
        self._take("evaluation", line["step"])

    def at_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self._take("end", error if error is None else type(error).__name__)


def trainer_of(tiny: str, *observers: Observer, steps: int = 2) -> Trainer:
    model = adapted(tiny)
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    data = TrainingData(make_examples(8), 4, 1, 64, held_out=make_examples(2, seed=9))
    return Trainer(model, optimizer, lambda step: 1e-3, data, Accelerator(), Limits(steps), observers)


def test_the_calls_of_a_run_in_order(tiny: str) -> None:
    first, second = Recorder(), Recorder()
    trainer_of(tiny, HeldOut(2), first, second, Observer()).fit()
    assert first.calls == second.calls == [
        ("evaluation", 0), ("before", 0), ("step", 1), ("before", 1), ("step", 2),
        ("evaluation", 2), ("before", 2), ("end", None),
    ]  # fmt: skip


def test_an_observer_stops_the_run_and_the_state_is_saved(tiny: str) -> None:
    """Its reason is in the sentence; whoever comes after it saves the state."""
    recorder, saved, progress = Recorder(stop_at=1), [], Progress()
    saver = Saver(lambda p: saved.append(p.step), progress)
    with pytest.raises(StoppedOnRequest, match=r"stopped after step 1 of 9 \(enough\); --resume auto goes on"):
        trainer_of(tiny, recorder, saver, steps=9).fit(progress)
    assert saved == [1] and recorder.calls[-1] == ("end", "StoppedOnRequest")


def test_an_observer_ends_the_run_as_if_it_were_done(tiny: str) -> None:
    class Enough(Recorder):
        def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
            super().after_step(trainer, line)
            trainer.is_enough = line["step"] == 2

    recorder, saved, sampled, progress = Enough(), [], [], Progress()
    samples, saver = Samples(sampled.append, every=5), Saver(lambda p: saved.append(p.step), progress)
    trainer_of(tiny, HeldOut(4), recorder, samples, saver, steps=9).fit(progress)
    assert saved == [2] and sampled == [0, 2] and recorder.calls[-1] == ("end", None)
    assert ("evaluation", 2) in recorder.calls  # as at any last step


@pytest.mark.parametrize("call", ["before", "step", "evaluation"])
def test_an_error_of_an_observer_ends_the_run_as_it_is(tiny: str, call: str) -> None:
    bad, other = Recorder(fails=call), Recorder()
    with pytest.raises(ValueError, match=f"no {call}"):
        trainer_of(tiny, HeldOut(1), other, bad).fit()
    assert other.calls[-1] == bad.calls[-1] == ("end", "ValueError")


def test_an_end_that_fails_is_raised_only_where_it_hides_nothing(tiny: str) -> None:
    """All are told of the end in any case."""
    bad, other = Recorder(fails="end"), Recorder()
    with pytest.raises(ValueError, match="no end"):
        trainer_of(tiny, bad, other).fit()
    assert other.calls[-1] == ("end", None)
    bad, other = Recorder(stop_at=1, fails="end"), Recorder()
    with pytest.raises(StoppedOnRequest, match="enough"):
        trainer_of(tiny, bad, other).fit()
    assert other.calls[-1] == ("end", "StoppedOnRequest")


def test_a_step_that_fails_without_a_saver_says_that_nothing_is_saved(tiny: str) -> None:
    trainer = trainer_of(tiny, recorder := Recorder())
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(
        TrainingStopped, match=r"step 1: loss nan.*; the state before it is not saved\."
    ) as stopped:
        trainer.fit()
    assert type(stopped.value) is TrainingStopped and recorder.calls[-1] == ("end", "StoppedAtStep")


def test_the_processes_agree_once_between_two_steps(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has a reason at its second time: this one, without any, stops with it and saves."""
    asked: list[bool] = []

    def any_device(flag: bool, accelerator: Any) -> bool:
        asked.append(flag)
        return len(asked) == 2

    saved, sampled, progress = [], [], Progress()
    saver, samples = Saver(lambda p: saved.append(p.step), progress), Samples(sampled.append, every=1)
    trainer = trainer_of(tiny, samples, saver, steps=9)
    monkeypatch.setattr(loop, "any_device", any_device)
    with pytest.raises(StoppedOnRequest, match="another process was asked to stop"):
        trainer.fit(progress)
    assert asked == [False, False] and saved == [1] and sampled == []


def test_a_request_is_passed_on() -> None:
    with StopRequest() as request:
        stop = Stop(request)
        assert stop.before_step(NOBODY) is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.before_step(NOBODY) == "SIGTERM"


def test_the_display_shows_steps_and_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(total_steps=1)
    display.after_step(NOBODY, {"step": 1, "loss": 1.5, "tokens_per_second": 10.0, "peak_memory_gib": 0.5})
    display.after_evaluation(NOBODY, {"step": 1, "eval_loss": 1.25}, True)
    said = capsys.readouterr().out
    assert "loss 1.5000" in said and "held-out loss 1.2500" in said


def test_a_page_and_a_curve_are_left_at_the_end(tmp_path: Path) -> None:
    with Page(write_run(tmp_path, [train_line(1), train_line(2)])) as page:
        page.after_step(NOBODY, train_line(2))
        assert not (tmp_path / "report.html").exists()
    assert "Run report" in Html((tmp_path / "report.html").read_text("utf-8")).text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    (write_run(tmp_path, [train_line(1)]) / "loss.png").mkdir()
    with Page(tmp_path, said.append):
        pass
    assert len(said) == 1 and said[0].startswith("loss.png could not be drawn (")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), True),
        (torch.distributed.DistNetworkError("The client socket has failed"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:21"), True),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("peer-reviewed models have no weight named nccl"), False),
    ],
)
def test_a_lost_process_is_told_from_a_bug(error: RuntimeError, expected: bool) -> None:
    """Any error whose text had "peer" or "nccl" in it was taken for a dead process."""
    assert is_lost_peer(error) == expected
