"""A run from its settings: the same from three doors, twice in one process, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import train
from qlora.cli.commands import generate as generate_command
from qlora.cli.commands import train as train_command
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.system.errors import InputError, StoppedOnRequest, TrainingStopped
from qlora.training.loop import Trainer
from qlora.training.observer import Observer
from qlora.training.run import TrainingRun
from qlora.training.run_directory import RunDirectory
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer
from tests.training.test_loop import TIMING


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of four steps, with everything that may watch it."""
    folder = tmp_path_factory.mktemp("job")
    model, data = save_tiny_llama(folder / "model", tokenizer=tiny_tokenizer()), folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(20)))
    text = (
        f"--model {model} --data {data} --compute-dtype float32 --batch-size 2 --max-steps 4 --rank 2 "
        "--eval-split 0.2 --eval-every 2 --save-every 2 --num-samples 1 --sample-tokens 2 --report-to tensorboard"
    )
    return text.split()


def config_of(job: list[str], out: Path, *flags: str) -> RunConfig:
    return parse_args(RunConfig, "test", [*job, "--output-dir", str(out), *flags])


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


class Watcher(Observer):
    """A user's observer."""

    def __init__(self, stop_at: int = -1) -> None:
        self.losses: list[float] = []
        self.evaluations: list[float] = []
        self.ends: list[BaseException | None] = []
        self.stop_at = stop_at

    def before_step(self, trainer: Trainer) -> str | None:
        return "seen enough" if trainer.progress.step == self.stop_at else None

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.losses.append(line["loss"])

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self.evaluations.append(line["eval_loss"])

    def at_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.ends.append(error)


def traces() -> tuple[Any, ...]:
    """What a run takes from its process: handlers, threads, children."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    children = {child.pid for child in psutil.Process().children()}
    return handlers, set(threading.enumerate()), children, multiprocessing.active_children()


def test_three_doors_lead_to_one_run_and_nothing_stays_behind(job: list[str], tmp_path: Path) -> None:
    """train.py, which spells the chapters out, `qlora train`, and Python; in one process, one after the other."""
    flags = [*job, "--output-dir"]
    train.main([*flags, str(tmp_path / "script")])  # what is made once for the process is made
    before = traces()
    train_command.main([*flags, str(tmp_path / "command")])
    assert traces() == before
    watcher = Watcher()
    with TrainingRun.from_config(config_of(job, tmp_path / "python"), observers=[watcher]) as run:
        run.train()
    assert traces() == before and run.trackers.trackers == []
    results = [lines_of(tmp_path / name) for name in ("script", "command", "python")]
    assert results[0] == results[1] == results[2] and len(results[0]) == 7
    adapters = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("script", "command", "python")
    ]
    assert adapters[0] == adapters[1] == adapters[2]
    for name in ("script", "command", "python"):
        out = tmp_path / name
        names = "adapter_config.json loss.png metrics.jsonl report.html run.json samples.jsonl"
        assert set(names.split()) <= {path.name for path in out.iterdir()}
        assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
        RunDirectory(str(out), "auto", run.accelerator, {}).release()  # the lock was given back
    assert watcher.losses == [line["loss"] for line in results[2] if "loss" in line] and len(watcher.losses) == 4
    assert watcher.evaluations == [line["eval_loss"] for line in results[2] if "eval_loss" in line]
    assert watcher.ends == [None]


def test_a_users_observer_stops_a_run_that_goes_on_later(job: list[str], tmp_path: Path) -> None:
    before = traces()
    whole, out = tmp_path / "whole", tmp_path / "out"
    with TrainingRun.from_config(config_of(job, whole)) as run:
        run.train()
    watcher = Watcher(stop_at=3)
    run = TrainingRun.from_config(config_of(job, out), observers=[watcher])
    with pytest.raises(StoppedOnRequest, match=r"after step 3 of 4 \(seen enough\)"), run:
        run.train()
    assert len(watcher.losses) == 3 and isinstance(watcher.ends[0], StoppedOnRequest)
    assert traces() == before and (out / "checkpoints/step-000003").is_dir() and (out / "loss.png").is_file()
    with TrainingRun.from_config(config_of(job, out, "--resume", "auto")) as run:
        run.train()
    assert lines_of(out) == lines_of(whole)
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("chapter", ["read_data", "load_base", "add_adapter", "_open_lines", "fit"])
def test_a_run_that_fails_gives_back_what_it_took(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chapter: str
) -> None:
    def fail(_run: TrainingRun) -> None:
        raise InputError(f"no {chapter}")

    before, out = traces(), tmp_path / "out"
    if chapter == "fit":
        monkeypatch.setattr(Trainer, "fit", lambda trainer, progress: fail(NotImplemented))
    else:
        monkeypatch.setattr(TrainingRun, chapter, fail)
    with pytest.raises(InputError, match=f"no {chapter}"), TrainingRun.from_config(config_of(job, out)) as run:
        run.train()
    assert traces() == before and run.trackers.trackers == []
    RunDirectory(str(out), "auto", run.accelerator, {}).release()


def test_training_that_cannot_go_on_is_an_error_of_python(job: list[str], tmp_path: Path) -> None:
    class Poison(Observer):
        def before_step(self, trainer: Trainer) -> None:
            if trainer.progress.step == 1:
                trainer.model.model.norm.weight.data.fill_(float("nan"))  # type: ignore[union-attr]

    config = config_of(job, tmp_path / "out", "--max-skipped", "0")
    with (
        pytest.raises(
            TrainingStopped, match=r"step 2: loss nan.*Its examples are in .*; the state before it is saved"
        ),
        TrainingRun.from_config(config, observers=[Poison()]) as run,
    ):
        run.train()
    assert (tmp_path / "out/checkpoints/step-000001").is_dir()
    assert (tmp_path / "out/skipped/step-000002.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "x"], "No model given; pass --model"),
        (["--model", "x"], "Nothing to do; pass --data FILE"),
        (["--model", "x", "--data", "x", "--eval-every", "5"], "--eval-every needs held-out data"),
    ],
)
def test_what_is_missing_is_an_input_error(flags: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        TrainingRun.from_config(parse_args(RunConfig, "test", flags))


def test_generate_answers_and_takes_no_flags_of_training(
    job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        generate_command.main(["--help"])
    words = capsys.readouterr().out
    assert all(flag in words for flag in ("--model", "--adapter", "--prompt", "--temperature", "--chat-template"))
    assert not any(flag in words for flag in ("--data", "--learning-rate", "--rank", "--save-every"))
    base = ["--model", job[1], "--compute-dtype", "float32", "--prompt", "1?", "--max-new-tokens", "3"]
    generate_command.main(base)
    answered = capsys.readouterr().out
    train.main(base)
    assert capsys.readouterr().out == answered
    with pytest.raises(InputError, match="--model and --prompt are required"):
        generate_command.main(["--model", "x"])
