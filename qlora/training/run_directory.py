"""The output directory of a run: its lock, its files, and the checkpoint to resume from.

OUTPUT_DIR/run.json                  every setting, to reproduce it, and facts of its latest start
           metrics.jsonl, loss.png   one line per optimizer step; the curve at the end
           samples.jsonl             completions of fixed prompts as they change
           report.html               the whole run on one page, refreshed during the run
           adapter_model.safetensors, adapter_config.json
           checkpoints/step-N/       full state
           skipped/step-N.jsonl      the examples of a step whose loss was not finite
           bad_rows.jsonl            rows left out by --on-bad-row skip
           .lock                     held while a run writes to the directory
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import make_directories, new_file, remove_leftovers
from qlora.system.redact import redact
from qlora.training.checkpoint import find_checkpoint, list_checkpoints, read_state, step_of

RUN = "run.json"


class RunDirectory:
    """A run's claim on its output directory, and the checkpoint it resumes from; made on all processes.

    Only the main process locks and writes. `release` gives the directory back.

    Args:
        output_dir: made if absent. A directory that a running run writes to is refused, and so is one with
            another run's metrics or adapter unless this run resumes in it.
        resume: None, "auto" or a checkpoint directory.
        settings: of the run, for run.json and checkpoints; secrets are removed.
    Raises:
        InputError: the directory is not writable, or it holds another run's results.
    """

    def __init__(
        self, output_dir: str, resume: str | None, accelerator: Accelerator, settings: dict[str, Any]
    ) -> None:
        self.path, self.accelerator, self.is_main = Path(output_dir), accelerator, accelerator.is_main_process
        self.settings: dict[str, Any] = json.loads(redact(json.dumps(settings)))
        self._run: str | None = None  # the content of run.json
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            if self.is_main:
                self._claim()
            self.checkpoint = find_checkpoint(resume, self.path, accelerator.print) if resume else None
            if self.is_main:
                self._check_other_runs(resume)
            if resume == "auto" and self.checkpoint is None:
                accelerator.print(f"--resume auto: {self.path} has no checkpoint; the run starts at step 1")
        except BaseException:
            self.release()
            raise
        accelerator.wait_for_everyone()

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    @property
    def bad_rows(self) -> Path | None:
        """File listing the rows skipped by --on-bad-row skip; None except on the main process."""
        return self.path / "bad_rows.jsonl" if self.is_main else None

    @property
    def done(self) -> int:
        """Steps done before this start, from the checkpoint's name."""
        return 0 if self.checkpoint is None else max(0, step_of(self.checkpoint))

    def compute_dtype(self, asked: str) -> str:
        """The compute dtype; a resumed run keeps its first, since measuring again could choose another."""
        return asked if asked != "auto" else str(self.kept("compute_dtype") or asked)

    def kept(self, name: str) -> Any:
        """A setting of the run that is resumed; None for a new run."""
        return None if self.checkpoint is None else read_state(self.checkpoint)["settings"].get(name)

    def set_aside_later(self, step: int) -> None:
        """Move away checkpoints later than `step`, so that --resume auto does not use them."""
        for path in list_checkpoints(self.path) if self.is_main and self.checkpoint is not None else ():
            if step_of(path) > step:
                aside = path.with_name(f"aside-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                self.accelerator.print(f"{path} is later than the checkpoint resumed from; kept as {aside.name}")

    def restore(self) -> None:
        """Make the directory again if it was deleted or moved while the run goes on: its lock, and run.json.

        Raises:
            OSError: that is not possible, or another run has taken its place.
        """
        if self._lock.is_locked and not Path(self._lock.lock_file).is_file():
            self.accelerator.print(f"--output-dir {self.path} is gone (deleted or moved); making it again")
            self._lock.release()
            make_directories(self.path)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise OSError(f"another run is writing to {self.path}") from error
            self._write_run()

    def missing_files(self) -> list[str]:
        """Names of the files that a finished run must have and that are not there."""
        return [name for name in (WEIGHTS, CONFIG, "metrics.jsonl", RUN) if not (self.path / name).is_file()]

    def write_run(self, facts: dict[str, Any] | None = None) -> None:
        """Write run.json: the settings, and facts of this start (`gather_facts`)."""
        known = {"facts": json.loads(redact(json.dumps(facts)))} if facts is not None else {}
        self._run = json.dumps(self.settings | known, indent=2) + "\n"
        self._write_run()

    def _write_run(self) -> None:
        if self._run is not None:
            with new_file(self.path / RUN) as file:
                file.write_text(self._run)

    def _claim(self) -> None:
        """Check that the directory is writable, lock it, and delete partial files of a killed run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass  # it is writable
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"Another run is writing to --output-dir {self.path}; wait for its end or choose another."
            ) from error
        except OSError as error:
            raise InputError(f"--output-dir {self.path} cannot be written ({error}); choose another.") from error
        for folder in (self.path, self.path / "checkpoints"):
            remove_leftovers(folder)

    def _check_other_runs(self, resume: str | None) -> None:
        holds = [name for name in ("metrics.jsonl", WEIGHTS) if (self.path / name).exists()]
        if not holds:
            return
        if resume is None:
            raise InputError(
                f"--output-dir {self.path} holds another run ({holds[0]}); pass --resume auto to continue "
                "it, or choose another directory."
            )
        if self.checkpoint is None and WEIGHTS in holds:
            raise InputError(
                f"--output-dir {self.path} holds an adapter but no checkpoint to resume from; choose another."
            )
        own = self.path / "checkpoints"
        if self.checkpoint is not None and self.checkpoint.resolve().parent != own.resolve():
            raise InputError(
                f"--resume {resume} is not from --output-dir {self.path}, which holds another run; choose "
                "another --output-dir."
            )
