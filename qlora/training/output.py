"""The output directory of a run: who writes what, when, and how a run finds its way back in.

    OUTPUT_DIR/run.json                  every setting, to reproduce it, and facts of its latest start
               metrics.jsonl, loss.png   one line per optimizer step; the curve at the end
               samples.jsonl             completions of fixed prompts as they change
               report.html               all that is known of the run, refreshed while it goes on
               adapter_model.safetensors, adapter_config.json
               checkpoints/step-N/       full state
               skipped/step-N.jsonl      the examples of a step whose loss was not finite
               .lock                     held while a run writes here

All processes of a run hold a `RunOutput`; only the main one writes. Checkpoints are written by a thread from
copies, so that training waits for the copies alone. A full disk costs no work: whole checkpoints stay, lines
of metrics wait in memory, and the next save tries again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from qlora.adapters.peft_files import AdapterSnapshot, snapshot_adapter, write_adapter
from qlora.config.lora import LoRAConfig
from qlora.data.example import IGNORE_INDEX, Example
from qlora.lora.adapter import lora_layers
from qlora.report.curve import plot_loss
from qlora.report.live import LiveReport
from qlora.system.errors import InputError, StoppedOnRequest, TrainingStopped
from qlora.system.file_names import WEIGHTS
from qlora.system.files import new_file, remove_leftovers
from qlora.system.memory import GIB
from qlora.system.redact import redact
from qlora.system.wording import explain
from qlora.training.checkpoint import (
    OPTIMIZER,
    STATE,
    best_checkpoint,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    step_of,
)
from qlora.training.display import RunDisplay
from qlora.training.lines import MetricsFile, is_sampled
from qlora.training.optimizer import MasterOptimizer
from qlora.training.progress import Progress
from qlora.training.trackers import Trackers, start_trackers


class RunOutput:
    """Writes metrics, samples, checkpoints, adapter and curve of one run.

    From `begin` on it is a context: leaving it waits for the last checkpoint and draws the curve, also after a run
    that stopped; after one that ended by itself it says where the best state is.

    Args:
        output_dir: made if absent. A directory with metrics or an adapter of another run is refused unless
            this run resumes in it, and so is one that a living run writes to.
        base_model: recorded in the adapter.
        resume: None, "auto" or a checkpoint directory.
        run: every setting, written to run.json and into checkpoints.
        keep_last: checkpoints to keep, see `prune_checkpoints`.
        load_best: at the end of the run its adapter is the best checkpoint's.
    Raises:
        InputError: nothing can be written there, or another run's results lie there.
    """

    def __init__(
        self,
        output_dir: str,
        base_model: str,
        resume: str | None,
        accelerator: Accelerator,
        run: dict[str, Any],
        keep_last: int = 0,
        load_best: bool = False,
    ) -> None:
        self.directory, self.base_model, self.accelerator = Path(output_dir), base_model, accelerator
        self.load_best, self.trackers = load_best, Trackers([])
        self.say: Callable[[str], object] = accelerator.print  # from `begin` on above the progress bar
        self.run, self.keep_last = json.loads(redact(json.dumps(run))), keep_last
        self.progress = Progress()
        if accelerator.is_main_process:
            self._claim()
        self.checkpoint = find_checkpoint(resume, self.directory, accelerator.print) if resume else None
        if accelerator.is_main_process:
            self._check_other_runs(resume)
        accelerator.wait_for_everyone()

    def _claim(self) -> None:
        """Take the directory: writable, locked, and swept of what a killed run left half written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass  # it can be written to
            self._lock = FileLock(self.directory / ".lock", timeout=0)
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"Another run is writing to --output-dir {self.directory}; wait for its end or choose another."
            ) from error
        except OSError as error:
            raise InputError(
                f"--output-dir {self.directory} cannot be written ({error}); choose another."
            ) from error
        for folder in (self.directory, self.directory / "checkpoints"):
            remove_leftovers(folder)

    def _check_other_runs(self, resume: str | None) -> None:
        holds = [name for name in ("metrics.jsonl", WEIGHTS) if (self.directory / name).exists()]
        if not holds:
            return
        if resume is None:
            raise InputError(
                f"--output-dir {self.directory} holds another run ({holds[0]}); pass --resume auto to continue "
                "it, or choose another directory."
            )
        if self.checkpoint is None and WEIGHTS in holds:
            raise InputError(
                f"--output-dir {self.directory} holds an adapter but no checkpoint to resume from; choose another."
            )
        own = self.directory / "checkpoints"
        if self.checkpoint is not None and self.checkpoint.resolve().parent != own.resolve():
            raise InputError(
                f"--resume {resume} is not from --output-dir {self.directory}, which holds another run; choose "
                "another --output-dir."
            )

    @property
    def bad_rows(self) -> Path | None:
        """Where the rows left out by --on-bad-row skip are listed; None on all but the main process."""
        return self.directory / "bad_rows.jsonl" if self.accelerator.is_main_process else None

    def compute_dtype(self, asked: str) -> str:
        """The compute dtype of a resumed run is the one it began with: measuring again could choose another."""
        if self.checkpoint is None or asked != "auto":
            return asked
        return str(read_state(self.checkpoint)["settings"].get("compute_dtype", asked))

    def start_trackers(self, project: str, run: str | None) -> None:
        """Begin the run in the trackers that the accelerator was made with.

        Args:
            run: its name; None = that of the directory.
        Raises:
            InputError: one of them does not start.
        """
        if self.accelerator.is_main_process:
            done = max(0, step_of(self.checkpoint)) if self.checkpoint is not None else 0
            start_trackers(self.accelerator, project, run or self.directory.resolve().name, self.run, done)
            self.trackers = Trackers(self.accelerator.trackers, self.say)

    def begin(
        self,
        model: nn.Module,
        lora_config: LoRAConfig,
        make_optimizer: Callable[[], MasterOptimizer],
        settings: dict[str, Any],
        total_steps: int,
        force: bool = False,
        facts: dict[str, Any] | None = None,
    ) -> MasterOptimizer:
        """The optimizer of a fresh or resumed run; sets `progress` and begins metrics.jsonl.

        Args:
            settings: what a resumed run must share with the checkpoint, unless `force`.
            facts: of this start, for run.json alone (`gather_facts`).
        """
        self.model, self.lora_config, self.settings = model, lora_config, settings
        say, is_main = self.accelerator.print, self.accelerator.is_main_process
        if self.checkpoint is not None:
            self.progress, self.optimizer = load_checkpoint(
                self.checkpoint, model, make_optimizer, settings, force, say
            )
            say(f"resumed from {self.checkpoint}, {self.progress.step} steps done")
        else:
            self.optimizer = make_optimizer()
        planned = sum((facts or {}).get("memory_plan", {}).values()) / GIB
        self.display = RunDisplay(total_steps, self.progress.step, quiet=not is_main, planned_gib=planned)
        self.say = self.display.say
        if is_main:
            self._set_aside_later_checkpoints()
            prune_checkpoints(self.directory, self.keep_last)  # a kill may have come before
            self._writer = ThreadPoolExecutor(1)
            # Its thread starts now: later there may be no memory for one. A kill may have come after the
            # checkpoint was written and before its adapter became the run's.
            self._writing: Future[Any] | None = self._writer.submit(self._adopt, self.checkpoint)
            with new_file(self.directory / "run.json") as file:
                known = {"facts": json.loads(redact(json.dumps(facts)))} if facts is not None else {}
                file.write_text(json.dumps(self.run | known, indent=2) + "\n")
            self._metrics = MetricsFile(self.directory / "metrics.jsonl", self.progress)
            samples = self.directory / "samples.jsonl"
            self._samples = MetricsFile(samples, self.progress, is_sampled) if samples.exists() else None
            self._page = LiveReport(self.directory, self.display.say)
        return self.optimizer

    def __enter__(self) -> RunOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        try:
            self.close(is_done=kind is None)
        except Exception as failure:
            if error is None or isinstance(error, StoppedOnRequest):
                raise
            if isinstance(error, TrainingStopped):
                raise TrainingStopped(f"{error} {explain(failure)}.") from failure
            # Any other error says more of the end than what it brought about.

    def _set_aside_later_checkpoints(self) -> None:
        """Hide checkpoints later than the one resumed from: --resume auto must not go back to their past."""
        for path in list_checkpoints(self.directory):
            if self.checkpoint is not None and step_of(path) > self.progress.step:
                aside = path.with_name(f"aside-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                self.accelerator.print(f"{path} is later than the checkpoint resumed from; kept as {aside.name}")

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, show it, and pass it to the trackers and the page."""
        if self.accelerator.is_main_process:
            self._metrics.write(line)
            self.display.show(line)
            self.trackers.log(line)
            self._page.notice(line)

    def write_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Append one step's to samples.jsonl, a line each; show them and pass them to the trackers."""
        if self._samples is None:
            self._samples = MetricsFile(self.directory / "samples.jsonl", self.progress, is_sampled)
        for sample in samples:
            self._samples.write(sample)
        self.display.show_samples(samples)
        self.trackers.log_samples(samples)

    def keep_batch(self, step: int, window: Sequence[Example]) -> str:
        """Write a step's examples for inspection; returns a sentence that says where."""
        path = self.directory / "skipped" / f"step-{step:06d}.jsonl"
        if not self.accelerator.is_main_process:
            return f"Its examples are in {path}"
        rows = [
            {
                "where": example.origin,
                "input_ids": example.input_ids.tolist(),
                "targets": [None if t == IGNORE_INDEX else t for t in example.targets.tolist()],
            }
            for example in window
        ]
        try:
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as file:
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            return f"Its examples ({', '.join(e.origin for e in window)}) could not be written ({error})"
        return f"Its examples are in {path}"

    def save(self, progress: Progress) -> None:
        """Begin to write the state as a checkpoint, and its adapter as the run's adapter.

        Copies are taken before this returns; a thread writes them. A write that fails is said and left to the
        next save, and to `close`.

        Raises:
            TrainingStopped: steps were made, but no adapter's B has left zero: nothing was learned.
        """
        made = progress.step - progress.skipped
        if made > 0 and not any(layer.lora_B.any() for layer in lora_layers(self.model).values()):
            raise TrainingStopped(f"After {made} steps every lora_B is still zero, so the adapter does nothing.")
        if self.accelerator.is_main_process:
            self._finish_writing()
            adapter = snapshot_adapter(self.model, self.lora_config, redact(self.base_model))
            moments = {
                name: tensor.to("cpu", copy=True).contiguous()
                for name, tensor in self.optimizer.state_tensors().items()
            }
            frozen = Progress(**vars(progress))
            unwritten = next(filter(None, [file.flush() for file in self._line_files]), None)
            self._writing = self._writer.submit(self._write, frozen, adapter, moments, unwritten)

    @property
    def _line_files(self) -> list[MetricsFile]:
        return [self._metrics] if self._samples is None else [self._metrics, self._samples]

    def _write(
        self,
        progress: Progress,
        adapter: AdapterSnapshot,
        moments: dict[str, torch.Tensor],
        unwritten: OSError | None,
    ) -> None:
        path = checkpoint_path(self.directory, progress.step)
        try:
            if unwritten is not None:
                raise unwritten  # lines of metrics: a checkpoint must not outlive those before it
            for file in self._line_files:
                file.sync()
            save_checkpoint(path, progress, adapter, moments, self.settings, self.run)
            write_adapter(adapter, self.directory)
            prune_checkpoints(self.directory, self.keep_last)
        except Exception as error:
            self.display.say(f"{path} could not be written ({error}); training goes on, the next save tries again")
            raise

    def _finish_writing(self) -> Exception | None:
        """Wait for the write under way; an error of the disk is returned, any other raised."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, SafetensorError) as error:  # a full disk is either, depending on the file
            return error
        return None

    def close(self, is_done: bool = True) -> None:
        """Wait for the last checkpoint, draw the loss curve, and say where the best state is.

        Args:
            is_done: the run ended by itself, so that its adapter may become the best checkpoint's (`load_best`).
        Raises:
            TrainingStopped: the last state could not be written.
        """
        if not self.accelerator.is_main_process:
            return
        self.display.close()
        failure: Exception | None = self._finish_writing()
        for file in self._line_files:
            unwritten = file.close()
            failure = failure or unwritten
        self._writer.shutdown()
        best = self._find_best()
        if is_done and failure is None and self.load_best:
            try:
                self._adopt(best)
            except OSError as error:
                failure = error
        self._page.finish()
        self._lock.release()
        self.trackers.finish()
        if failure is not None:
            whole = [path.name for path in list_checkpoints(self.directory)]
            raise TrainingStopped(
                f"The last state could not be written to {self.directory} ({failure}); free some space, then "
                f"--resume auto goes on from {whole[-1] if whole else 'the start'}."
            )
        try:
            plot_loss(self.directory / "metrics.jsonl", self.directory / "loss.png")
        except Exception as error:  # no picture is worth hiding how the run ended
            self.accelerator.print(f"loss.png could not be drawn ({error}); all else is saved")
        if best is not None:
            self.accelerator.print(self._describe_best(best, is_adopted=is_done and self.load_best))

    def _find_best(self) -> Path | None:
        """The best checkpoint, if it is whole."""
        best = best_checkpoint(self.directory)
        try:
            return best if best is None or read_state(best) else None
        except InputError as error:
            self.accelerator.print(f"the best checkpoint cannot be used: {error}")
            return None

    def _adopt(self, checkpoint: Path | None) -> None:
        """Make a checkpoint's adapter the run's; None does nothing."""
        with ExitStack() as files:  # all are copied, then all take their places
            for path in checkpoint.iterdir() if checkpoint is not None else ():
                if path.name not in (STATE, OPTIMIZER):
                    shutil.copyfile(path, files.enter_context(new_file(self.directory / path.name)))

    def _describe_best(self, best: Path, is_adopted: bool) -> str:
        """One line: the best checkpoint, and whether the best evaluation was of another state."""
        progress = read_state(best)["progress"]
        is_kept = (progress.eval_loss, progress.score) == (self.progress.best_loss, self.progress.best_score)
        score = "" if progress.score is None else f", exact match {progress.score:.1%}"
        lost = "" if is_kept else "; the best evaluation was of a state that was not saved"
        taken = "; its adapter is the run's" if is_adopted else ""
        return f"best checkpoint: {best} (held-out loss {progress.eval_loss:.4f}{score}{lost}{taken})"
