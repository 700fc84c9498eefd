"""The output directory of a run: whose it is, what lies there, and how a run finds its way back in.

OUTPUT_DIR/run.json                  every setting, to reproduce it, and facts of its latest start
           metrics.jsonl, loss.png   one line per optimizer step; the curve at the end
           samples.jsonl             completions of fixed prompts as they change
           report.html               the whole run on one page, refreshed while it goes on
           adapter_model.safetensors, adapter_config.json
           checkpoints/step-N/       full state
           skipped/step-N.jsonl      the examples of a step whose loss was not finite
           bad_rows.jsonl            rows left out by --on-bad-row skip
           .lock                     held while a run writes here
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
from qlora.system.file_names import WEIGHTS
from qlora.system.files import new_file, remove_leftovers
from qlora.system.redact import redact
from qlora.training.checkpoint import find_checkpoint, list_checkpoints, read_state, step_of


class RunDirectory:
    """A run's claim on its output directory, and the checkpoint it goes on from; on all of its processes.

    Only the main process locks and writes. `release` gives the directory back.

    Args:
        output_dir: made if absent. A directory with metrics or an adapter of another run is refused unless
            this run resumes in it, and so is one that a living run writes to.
        resume: None, "auto" or a checkpoint directory.
        settings: of the run, for run.json and checkpoints; secrets are taken out.
    Raises:
        InputError: nothing can be written there, or another run's results lie there.
    """

    def __init__(
        self, output_dir: str, resume: str | None, accelerator: Accelerator, settings: dict[str, Any]
    ) -> None:
        self.path, self.accelerator, self.is_main = Path(output_dir), accelerator, accelerator.is_main_process
        self.settings: dict[str, Any] = json.loads(redact(json.dumps(settings)))
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            if self.is_main:
                self._claim()
            self.checkpoint = find_checkpoint(resume, self.path, accelerator.print) if resume else None
            if self.is_main:
                self._check_other_runs(resume)
        except BaseException:
            self.release()
            raise
        accelerator.wait_for_everyone()

    def release(self) -> None:
        """Give up the lock."""
        self._lock.release()

    @property
    def bad_rows(self) -> Path | None:
        """Where the rows left out by --on-bad-row skip are listed; None on all but the main process."""
        return self.path / "bad_rows.jsonl" if self.is_main else None

    @property
    def done(self) -> int:
        """Steps done before this start, as the name of the checkpoint has it."""
        return 0 if self.checkpoint is None else max(0, step_of(self.checkpoint))

    def compute_dtype(self, asked: str) -> str:
        """The compute dtype of a resumed run is the one it began with: measuring again could choose another."""
        if self.checkpoint is None or asked != "auto":
            return asked
        return str(read_state(self.checkpoint)["settings"].get("compute_dtype", asked))

    def set_aside_later(self, step: int) -> None:
        """Hide checkpoints later than the one resumed from: --resume auto must not go back to their past."""
        for path in list_checkpoints(self.path) if self.is_main and self.checkpoint is not None else ():
            if step_of(path) > step:
                aside = path.with_name(f"aside-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                self.accelerator.print(f"{path} is later than the checkpoint resumed from; kept as {aside.name}")

    def write_run(self, facts: dict[str, Any] | None = None) -> None:
        """Write run.json: the settings, and facts of this start (`gather_facts`)."""
        known = {"facts": json.loads(redact(json.dumps(facts)))} if facts is not None else {}
        with new_file(self.path / "run.json") as file:
            file.write_text(json.dumps(self.settings | known, indent=2) + "\n")

    def _claim(self) -> None:
        """Take the directory: writable, locked, and swept of what a killed run left half written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass  # it can be written to
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
