"""The output directory is deleted or moved while a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.system.errors import InputError, TrainingStopped
from qlora.training.lines import LinesFile
from qlora.training.loop import Trainer
from qlora.training.observer import Observer
from qlora.training.progress import Progress
from qlora.training.run import TrainingRun
from tests.training.test_outcome import job  # noqa: F401
from tests.training.test_run import config_of


class At(Observer):
    """Does something before a step."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step, self.what = step, what

    def before_step(self, trainer: Trainer) -> None:
        if trainer.progress.step == self.step:
            self.what()


def fit(job: list[str], out: Path, *observers: Observer) -> TrainingRun:  # noqa: F811
    flags = "--max-steps 4 --save-every 2 --num-samples 1 --sample-every 1 --sample-tokens 1".split()
    with TrainingRun.from_config(config_of(job, out, *flags), observers=observers) as run:
        return run.train()


def remove(folder: Path) -> None:
    """While a checkpoint is being written there, too."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def lose(out: Path, how: str) -> Callable[[], object]:
    return {
        "deleted": lambda: remove(out),
        "moved": lambda: out.rename(out.with_name("moved")),
        "emptied": lambda: [p.unlink() for p in out.iterdir() if p.is_file()],
    }[how]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("how", ["deleted", "moved", "emptied"])
def test_it_is_made_again(
    job: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    step: int,
) -> None:
    """It was exit code 0 with metrics, run.json, samples and report gone."""
    out = tmp_path / "out"
    fit(job, out, At(step, lose(out, how)))
    said = capsys.readouterr().out
    assert "is gone (deleted or moved); making it again" in " ".join(said.split())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # those before it, too
    samples = [json.loads(line)["step"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples == [1, 2, 3, 4]
    names = {path.name for path in out.iterdir()}
    assert {"run.json", "loss.png", "report.html", "adapter_model.safetensors", "checkpoints", ".lock"} <= names
    with pytest.raises(InputError, match="holds another run"):
        fit(job, out)


def test_a_run_that_lacks_its_files_fails(
    job: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Deleted after the last state was saved."""
    out = tmp_path / "out"

    class Last(Observer):
        def at_end(self, trainer: Trainer, error: BaseException | None) -> None:
            trainer.observers[-1].live.finish = lambda: (out / "adapter_config.json").unlink()

    with pytest.raises(TrainingStopped, match=r"adapter_config.json of this run is missing"):
        fit(job, out, Last())
    assert "Adapter saved" not in capsys.readouterr().out


def test_only_what_is_there_is_named(
    job: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("qlora.training.page.plot_loss", fail)
    fit(job, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "Adapter saved" in said and "Full report:" in said and "Loss curve:" not in said


def test_lines_of_a_replaced_file(tmp_path: Path) -> None:
    """Another file under the name: the lines go on in a file with all of them."""
    file = LinesFile(tmp_path / "a.jsonl", Progress())
    file.write({"step": 1})
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").write_text("something else\n")
    file.write({"step": 2})
    assert file.close() is None
    assert (tmp_path / "a.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
