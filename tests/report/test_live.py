"""The page while a run goes on: made by another process, in time, and never in the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora.report import live as live_report
from qlora.report.live import LiveReport
from tests.models import save_tiny_llama
from tests.pages import Page, train_line, write_run
from tests.training.outputs import begin
from tests.training.test_checkpoint import adapted

EVALUATION = {"step": 2, "eval_loss": 1.5}


class Clock:
    """Stands in for time.monotonic."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live_report, "time", clock)
    return clock


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[float]:
    """The times at which a page was begun; no process is."""
    times: list[float] = []
    monkeypatch.setattr(live_report.subprocess, "Popen", lambda *args, **options: times.append(clock.now))
    return times


def test_when_a_page_is_made(tmp_path: Path, clock: Clock, started: list[float]) -> None:
    """After half a minute, or ten seconds where an evaluation waits to be shown; steps in between cost nothing."""
    live = LiveReport(tmp_path, print)
    steps, evaluations = (1, 10, 15, 39, 40, 41, 69), (9, 71, 81)
    for seconds in sorted(steps + evaluations):
        clock.now = 100.0 + seconds
        live.notice(EVALUATION if seconds in evaluations else train_line(seconds))
    assert started == [110, 140, 171, 181]  # not 169: 29 seconds after the one before


def test_one_page_at_a_time(tmp_path: Path, clock: Clock) -> None:
    """A process that takes long is not joined by another; one that is done is."""
    live = LiveReport(write_run(tmp_path, [train_line(1)]), print)
    clock.now += 30
    live.notice(train_line(1))
    first = live._maker
    assert first is not None
    first.send_signal(signal.SIGSTOP)
    clock.now += 30
    live.notice(train_line(2))
    assert live._maker is first
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert "Run report" in Page((tmp_path / "report.html").read_text("utf-8")).text
    live.notice(train_line(3))
    assert live._maker is not None and live._maker is not first
    live._maker.wait(60)


def test_a_page_that_fails_is_said_once(tmp_path: Path, clock: Clock) -> None:
    """The directory is not there: each process fails, and so does the last page."""
    said: list[str] = []
    live = LiveReport(tmp_path / "gone", said.append)
    for _ in range(3):
        clock.now += 30
        live.notice(EVALUATION)
        assert live._maker is not None
        live._maker.wait(60)
    told = f"report.html could not be made ({tmp_path}/gone is not a directory; pass the --output-dir of a run.)"
    assert said == [f"{told}; all else goes on"]
    live.finish()
    assert len(said) == 2


def test_a_process_that_cannot_start_is_no_error(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(live_report.sys, "executable", str(tmp_path / "python"))
    live = LiveReport(write_run(tmp_path, [train_line(1)]), said.append)
    for _ in range(2):
        clock.now += 30
        live.notice(train_line(1))
    assert len(said) == 1 and "No such file" in said[0]
    live.finish()
    assert len(said) == 1 and (tmp_path / "report.html").is_file()


def test_the_end_waits_for_no_process_for_ever(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_report, "PATIENCE", 0.01)
    live = LiveReport(write_run(tmp_path, [train_line(1)]), print)
    clock.now += 30
    live.notice(train_line(1))
    assert live._maker is not None
    live._maker.send_signal(signal.SIGSTOP)
    live.finish()
    assert live._maker.returncode == -signal.SIGKILL and (tmp_path / "report.html").is_file()


# ---- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def test_a_run_leaves_its_page(tiny: str, tmp_path: Path, started: list[float], clock: Clock) -> None:
    """All lines are noticed; the last page has them all, also after a run that was stopped and resumed."""
    output = begin(tmp_path, adapted(tiny))
    output.log(train_line(1))
    clock.now += 10
    output.log(EVALUATION)
    assert started == [clock.now] and not (tmp_path / "report.html").exists()
    output.close()
    assert "The held-out loss is 1.500 (step 2)" in Page((tmp_path / "report.html").read_text("utf-8")).text
    output = begin(tmp_path, adapted(tiny), "auto")
    output.log(train_line(1))
    output.log(train_line(2))
    output.close()
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert [row[0] for row in page.rows("Loss per")] == ["1", "2"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_page_that_cannot_be_made_ends_no_run(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_report(_: Any) -> Path:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(live_report, "write_report", write_report)
    output = begin(tmp_path, adapted(tiny))
    output.log(train_line(1))
    output.close()
    assert "report.html could not be made (of all things)" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1 and (tmp_path / "loss.png").is_file()
