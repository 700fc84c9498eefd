"""A run's directory with all that writes to it, without a loop: each part is called as the observers call it."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qlora.config.lora import LoRAConfig
from qlora.lora.optimizer import MasterOptimizer, build_optimizer
from qlora.lora.trainable import lora_parameters
from qlora.training.checkpoint import load_checkpoint
from qlora.training.lines import LinesFile, is_sampled
from qlora.training.page import Page
from qlora.training.progress import Progress
from qlora.training.run_directory import RunDirectory
from qlora.training.saver import CheckpointWriter, TrainedState
from qlora.training.trackers import Trackers
from tests.training.test_checkpoint import SETTINGS, stepped

TIMING = {"tokens_per_second": 1.0, "peak_memory_gib": 1.0}


class Output:
    """What `TrainingRun` opens in a directory, in its order; it ends as a run does: as a context or by `close`."""

    def __init__(
        self,
        directory: Path,
        model: Any,
        resume: str | None = None,
        base_model: str = "base",
        settings: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._stack = ExitStack()
        self.directory = RunDirectory(str(directory), resume, Accelerator(), run or {"rank": 4})
        self._stack.callback(self.directory.release)
        self.trackers = Trackers([])
        self._stack.callback(lambda: self.trackers.finish())
        settings, checkpoint = SETTINGS if settings is None else settings, self.directory.checkpoint

        def make() -> MasterOptimizer:
            return build_optimizer(lora_parameters(model), "adamw")

        self.progress, self.optimizer = Progress(), make() if checkpoint is None else None
        if checkpoint is not None:
            self.progress, self.optimizer = load_checkpoint(checkpoint, model, make, settings)
        self.page = self._stack.enter_context(Page(directory))
        self.directory.set_aside_later(self.progress.step)
        state = TrainedState(model, LoRAConfig(rank=4), self.optimizer, base_model)
        self.writer = CheckpointWriter(self.directory, state, settings, self.progress, **options)
        self._stack.enter_context(self.writer)
        self.directory.write_run()
        self.metrics = LinesFile(directory / "metrics.jsonl", self.progress)
        self.samples = LinesFile(directory / "samples.jsonl", self.progress, is_sampled, is_lazy=True)
        self.writer.lines = [self.metrics, self.samples]
        self.save = self.writer.save

    def use(self, optimizer: MasterOptimizer) -> None:
        """Let checkpoints hold this optimizer."""
        self.optimizer, old = optimizer, self.writer.state
        self.writer.state = TrainedState(old.model, old.lora, optimizer, old.base_model)

    def log(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self.trackers.log(line)
        self.page.live.notice(line)

    def write_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        for sample in samples:
            self.samples.write(sample)
        self.trackers.log_samples(samples)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def begin(directory: Path, model: Any, resume: str | None = None, **options: Any) -> Output:
    """A run's output over `model`, whose optimizer has made a step."""
    output = Output(directory, model, resume, **options)
    if resume is None:
        output.use(stepped(model))
    return output


def step_line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, **TIMING}


def read_steps(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


class FullDisk:
    """Stands in for a file on a disk that has `room` bytes left."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
