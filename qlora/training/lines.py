"""Write metrics.jsonl and samples.jsonl: complete lines in step order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.system.files import new_file, whole_lines
from qlora.training.observer import Observer
from qlora.training.progress import Progress

if TYPE_CHECKING:
    from qlora.training.loop import Trainer


def _is_done(line: dict[str, Any], progress: Progress) -> bool:
    """Whether the line's step or evaluation will not be repeated."""
    if "eval_loss" in line and line["step"] == progress.step:
        return progress.eval_loss is not None
    return bool(line["step"] <= progress.step)


def is_sampled(line: dict[str, Any], progress: Progress) -> bool:
    """Whether the line's sample will not be repeated."""
    return bool(line["step"] <= progress.sampled)


class LinesFile:
    """A .jsonl file of a run: complete lines in step order, none lost or duplicated by a resume.

    Args:
        progress: where the run resumes; lines of work to be repeated are dropped.
        is_done: whether a line's work will not be repeated.
        is_lazy: create the file only with its first line.
        restore: called when the file is gone, to make its directory again.
    """

    def __init__(
        self,
        path: Path,
        progress: Progress,
        is_done: Callable[[dict[str, Any], Progress], bool] = _is_done,
        is_lazy: bool = False,
        restore: Callable[[], object] = lambda: None,
    ) -> None:
        self.path, self._pending, self._restore = path, b"", restore
        self._file: FileIO | None = None
        if path.exists() or not is_lazy:
            kept = [line for line in _whole_lines(path) if is_done(line, progress)]
            self._open("".join(json.dumps(line) + "\n" for line in kept).encode())

    def _open(self, content: bytes = b"") -> None:
        with new_file(self.path) as staging:
            staging.write_bytes(content)
        self._file = self.path.open("a+b", buffering=0)

    def _find_again(self) -> None:
        """Make the file for its first line, or again with all its lines if it was deleted, moved or replaced."""
        if self._file is None:
            if self._pending:
                self._restore()
                self._open()
            return
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        except OSError:
            pass
        self._restore()
        old = self._file
        old.seek(0)  # its content stays as long as it is open
        self._open(old.readall())
        old.close()

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; if the disk is full, it is kept and written before the next line."""
        self._pending += json.dumps(line).encode() + b"\n"
        self.flush()

    def flush(self) -> OSError | None:
        """Write pending lines; returns the error if that fails."""
        try:
            self._find_again()
            while self._pending and self._file is not None:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            return error
        return None

    def sync(self) -> None:
        """Sync written lines to disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> OSError | None:
        """Close the file; returns the error if lines could not be written."""
        failure = self.flush()
        if self._file is not None:
            self._file.close()
        return failure


class Metrics(Observer):
    """Writes metrics.jsonl: a line per step and per evaluation."""

    def __init__(self, file: LinesFile) -> None:
        self.file = file

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.file.write(line)

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self.file.write(line)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in whole_lines(path) if isinstance(line.get("step"), int)]
