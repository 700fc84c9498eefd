"""report.html during a run, without slowing it down.

Another process makes the page, of the lowest priority and the first to be killed where memory runs out: it takes
nothing of the run's interpreter, its imports delay no step, and nothing that goes wrong there reaches the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora.report.page import write_report

EVERY, AFTER_EVALUATION = 30.0, 10.0  # seconds from one page to the next, and to one with a new evaluation
PATIENCE = 20.0  # seconds to wait for a page under way when the run is over


class LiveReport:
    """Refreshes the page of a run.

    Args:
        say: receives a sentence, once, if a page could not be made.
    """

    def __init__(self, directory: Path, say: Callable[[str], object]) -> None:
        self.directory, self._say = directory, say
        self._last, self._is_due = time.monotonic(), False
        self._maker: subprocess.Popen[str] | None = None
        self._has_failed = False

    def notice(self, line: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl, which is written already, and begin a page if it is time for one."""
        self._is_due |= "eval_loss" in line
        if time.monotonic() - self._last < (AFTER_EVALUATION if self._is_due else EVERY) or self._is_making():
            return
        self._last, self._is_due = time.monotonic(), False
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        try:
            self._maker = subprocess.Popen(
                [sys.executable, "-m", "qlora", "report", str(self.directory)],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the run alone
            )
            with suppress(OSError, AttributeError):  # a system without these
                os.setpriority(os.PRIO_PROCESS, self._maker.pid, 19)
                Path(f"/proc/{self._maker.pid}/oom_score_adj").write_text("1000")
        except Exception as error:  # whatever it is, training goes on
            self._fail(str(error))

    def finish(self) -> None:
        """Make the last page, in this process; never raises an ordinary exception."""
        try:
            if self._maker is not None:
                with suppress(subprocess.TimeoutExpired):
                    self._maker.wait(PATIENCE)
                self._maker.kill()
                self._maker.wait()
            write_report(self.directory)
        except Exception as error:  # no page is worth hiding how the run ended
            self._has_failed = False  # the last one is worth a word of its own
            self._fail(str(error))

    def _is_making(self) -> bool:
        """Whether a page is under way; of one that is done it is told here how it went."""
        if self._maker is None:
            return False
        if self._maker.poll() is None:
            return True
        assert self._maker.stderr is not None
        with self._maker.stderr as errors:
            last = errors.read().strip().rpartition("\n")[2]
        if self._maker.returncode != 0:
            self._fail(last or f"its process ended with {self._maker.returncode}")
        self._maker = None
        return False

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._say(f"report.html could not be made ({reason.removeprefix('error: ')}); all else goes on")
        self._has_failed = True
