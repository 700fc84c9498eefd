"""Requests to stop a run: SIGTERM, SIGINT or a time limit, checked between steps.

After the first signal the loop finishes its step, saves and ends. A second one ends the process at once, or, if
the run shares the process, goes to the previous handler. That is safe too: every file of a run is written
atomically.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_SECONDS = 1.0  # launchers and terminals may deliver one request several times


class StopRequest:
    """Call it to get the reason to stop now, or None. Handles signals inside a `with` block in the main thread.

    Args:
        deadline: in seconds of time.monotonic(), which clock changes do not affect; None = no limit.
        ends_process: whether a second signal ends the process; False: it goes to the previous handler.
    Attributes:
        signal: the first one received.
    """

    def __init__(self, deadline: float | None = None, ends_process: bool = True) -> None:
        self.deadline, self.ends_process = deadline, ends_process
        self.signal: int | None = None
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = number, now
            os.write(2, b"stopping: finishing the step and saving; a second signal ends at once\n")
        elif now - self._first > SAME_REQUEST_SECONDS:
            if self.ends_process:
                os._exit(128 + number)
            self.__exit__()
            signal.raise_signal(number)

    def __call__(self) -> str | None:
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "--stop-after"
        return None
