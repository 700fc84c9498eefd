"""metrics.jsonl and samples.jsonl: whole lines in the order of the steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora.system.files import new_file, whole_lines
from qlora.training.progress import Progress


def _is_done(line: dict[str, Any], progress: Progress) -> bool:
    """Whether the line is of a step, or an evaluation, that the run will not do again."""
    if "eval_loss" in line and line["step"] == progress.step:
        return progress.eval_loss is not None
    return bool(line["step"] <= progress.step)


def is_sampled(line: dict[str, Any], progress: Progress) -> bool:
    """Whether the line is a sample that the run will not take again."""
    return bool(line["step"] <= progress.sampled)


class MetricsFile:
    """metrics.jsonl of a run: whole lines in the order of the steps, none lost or twice after a resume.

    Args:
        progress: lines of what will be done again are dropped.
        is_done: whether a line is of what will not be done again.
    """

    def __init__(
        self, path: Path, progress: Progress, is_done: Callable[[dict[str, Any], Progress], bool] = _is_done
    ) -> None:
        kept = [line for line in _whole_lines(path) if is_done(line, progress)]
        with new_file(path) as staging:
            staging.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._pending = b""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; what a full disk does not take now goes before the next line."""
        self._pending += json.dumps(line).encode() + b"\n"
        self.flush()

    def flush(self) -> OSError | None:
        """Write what waits; returns the error if some still does."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            return error
        return None

    def sync(self) -> None:
        """Bring what was written to the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> OSError | None:
        """Returns the error if lines could not be written."""
        failure = self.flush()
        self._file.close()
        return failure


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in whole_lines(path) if isinstance(line.get("step"), int)]
