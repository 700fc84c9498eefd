"""Requests to stop a run: SIGTERM, SIGINT or a time limit, checked between steps.

After the first signal the loop finishes its step, saves and ends. A second one ends the process at once, which is
also safe: every file of a run is written atomically.
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
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._signal: int | None = None
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._first = number, now
            os.write(2, b"stopping: finishing the step and saving; a second signal ends at once\n")
        elif now - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def __call__(self) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "--stop-after"
        return None
