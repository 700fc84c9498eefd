"""Decide when a run is saved, and write its checkpoints in a thread.

The thread writes copies, so training waits only for the copying. A full disk loses nothing: complete checkpoints
stay, lines of metrics wait in memory, and the next save tries again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from qlora.adapters.peft_files import AdapterSnapshot, snapshot_adapter, write_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import lora_layers
from qlora.lora.optimizer import MasterOptimizer
from qlora.system.errors import InputError, StoppedOnRequest, TrainingStopped
from qlora.system.files import new_file
from qlora.system.redact import redact
from qlora.system.wording import explain
from qlora.training.checkpoint import (
    OPTIMIZER,
    STATE,
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from qlora.training.lines import LinesFile
from qlora.training.observer import Observer
from qlora.training.progress import Progress
from qlora.training.run_directory import RunDirectory
from qlora.training.step import StoppedAtStep

if TYPE_CHECKING:
    from qlora.training.loop import Trainer


class Saver(Observer):
    """Saves each state worth keeping, once.

    Saves every `every` steps; after the best evaluation so far, with `every` or `keep_best`; at the end; before a
    stop; and the state before a failed step.

    Args:
        save: writes the current state; called on every process (`CheckpointWriter.save`).
        progress: the state that the run starts from, which is not saved again.
    """

    def __init__(
        self, save: Callable[[Progress], object], progress: Progress, every: int = 0, keep_best: bool = False
    ) -> None:
        self.save, self.every, self.keep_best = save, every, keep_best
        self._saved, self._is_best = replace(progress), False

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self._is_best = is_best

    def before_step(self, trainer: Trainer) -> None:
        step = trainer.progress.step
        by_step = self.every and step % self.every == 0
        by_evaluation = self._is_best and (self.every or self.keep_best)
        self._is_best = False
        if trainer.is_last or trainer.is_stopping() or (step and (by_step or by_evaluation)):
            self._save_if_new(trainer.progress)

    def at_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if not isinstance(error, StoppedAtStep):
            return
        try:
            self._save_if_new(trainer.progress)
            error.state = "the state before it is saved"
        except Exception as failure:  # must not hide why training stopped
            step = self._saved.step
            last = f"that after step {step} is the last saved" if step else "none was saved before"
            error.state = f"the state before it could not be saved ({explain(failure)}); {last}"

    def _save_if_new(self, progress: Progress) -> None:
        if progress != self._saved:
            self.save(progress)
            self._saved = replace(progress)


@dataclass(frozen=True)
class TrainedState:
    """The content of a checkpoint besides the progress.

    Args:
        base_model: recorded in the adapter; secrets in it are removed.
    """

    model: nn.Module
    lora: LoRAConfig
    optimizer: MasterOptimizer
    base_model: str

    @property
    def is_untouched(self) -> bool:
        """Whether every adapter's B is still zero."""
        layers = lora_layers(self.model).values()
        return bool(layers) and not any(layer.weights.lora_B.any() for layer in layers)

    def copy(self) -> tuple[AdapterSnapshot, dict[str, Tensor]]:
        """(the adapter, the optimizer's tensors), in main memory."""
        adapter = snapshot_adapter(self.model, self.lora, redact(self.base_model))
        tensors = self.optimizer.state_tensors().items()
        return adapter, {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors}


class CheckpointWriter:
    """Writes checkpoints, and their adapters as the run's adapter.

    All processes of a run have one; only the main one writes. As a context manager it waits on exit for the last
    checkpoint, closes the `lines`, and says where the best state is.

    Args:
        settings: must be the same when the run is resumed.
        progress: the run's, updated as it trains.
        keep_last: checkpoints to keep, see `prune_checkpoints`.
        load_best: at the end of a run that was not stopped, make the best checkpoint's adapter the run's.
    Attributes:
        lines: files whose lines are synced to disk before a checkpoint, which must not outlive them.
    """

    def __init__(
        self,
        directory: RunDirectory,
        state: TrainedState,
        settings: dict[str, Any],
        progress: Progress,
        keep_last: int = 0,
        load_best: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        self.directory, self.state, self.settings, self.progress = directory, state, settings, progress
        self.keep_last, self.load_best, self.say = keep_last, load_best, say
        self.lines: list[LinesFile] = []
        self._writing: Future[Any] | None = None
        if directory.is_main:
            prune_checkpoints(directory.path, keep_last)  # an earlier run may have been killed before this
            self._thread = ThreadPoolExecutor(1)
            # Start it now: later there may be no memory for it. An earlier run may have been killed between
            # writing the checkpoint and making its adapter the run's.
            self._writing = self._thread.submit(self._adopt, directory.checkpoint)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        try:
            self.close(is_done=kind is None)
        except Exception as failure:
            if error is None or isinstance(error, StoppedOnRequest):
                raise
            if isinstance(error, TrainingStopped):
                raise TrainingStopped(f"{error} {explain(failure)}.") from failure
            # Another error explains the end better than its consequences.

    def save(self, progress: Progress) -> None:
        """Start to write the state as a checkpoint, and its adapter as the run's adapter.

        Copies are taken before this returns; a thread writes them. A failed write is reported, and the next save
        or `close` retries it.

        Raises:
            TrainingStopped: steps were made, but every adapter's B is still zero: nothing was learned.
        """
        made = progress.step - progress.skipped
        if made > 0 and self.state.is_untouched:
            raise TrainingStopped(f"After {made} steps every lora_B is still zero, so the adapter does nothing.")
        if self.directory.is_main:
            self.wait()
            adapter, moments = self.state.copy()
            unwritten = next(filter(None, [file.flush() for file in self.lines]), None)
            self._writing = self._thread.submit(self._write, replace(progress), adapter, moments, unwritten)

    def _write(
        self, progress: Progress, adapter: AdapterSnapshot, moments: dict[str, Tensor], unwritten: OSError | None
    ) -> None:
        path = checkpoint_path(self.directory.path, progress.step)
        try:
            if unwritten is not None:
                raise unwritten
            self.directory.restore()
            for file in self.lines:
                file.sync()
            save_checkpoint(path, progress, adapter, moments, self.settings, self.directory.settings)
            write_adapter(adapter, self.directory.path)
            prune_checkpoints(self.directory.path, self.keep_last)
        except Exception as error:
            self.say(f"{path} could not be written ({error}); training goes on, the next save tries again")
            raise

    def wait(self) -> Exception | None:
        """Wait for the current write; returns a disk error, raises any other."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, SafetensorError) as error:  # a full disk is either, depending on the file
            return error
        return None

    def close(self, is_done: bool = True) -> None:
        """Wait for the last checkpoint, close the lines, and say where the best state is.

        Args:
            is_done: the run was not stopped, so the best checkpoint's adapter may become the run's (`load_best`).
        Raises:
            TrainingStopped: the last state could not be written.
        """
        if not self.directory.is_main:
            return
        try:
            failure = self.wait()
        finally:
            unwritten = [file.close() for file in self.lines]
            self._thread.shutdown()
        failure = failure or next(filter(None, unwritten), None)
        best, path = self._find_best(), self.directory.path
        if is_done and failure is None and self.load_best:
            try:
                self._adopt(best)
            except OSError as error:
                failure = error
        if failure is not None:
            whole = [checkpoint.name for checkpoint in list_checkpoints(path)]
            raise TrainingStopped(
                f"The last state could not be written to {path} ({failure}); free some space, then "
                f"--resume auto goes on from {whole[-1] if whole else 'the start'}."
            )
        if best is not None:
            self.say(self._describe_best(best, is_adopted=is_done and self.load_best))

    def _find_best(self) -> Path | None:
        """The best checkpoint, if it is complete."""
        best = best_checkpoint(self.directory.path)
        try:
            return best if best is None or read_state(best) else None
        except InputError as error:
            self.say(f"the best checkpoint cannot be used: {error}")
            return None

    def _adopt(self, checkpoint: Path | None) -> None:
        """Make a checkpoint's adapter the run's; None does nothing."""
        with ExitStack() as files:  # copy all, then rename all
            for path in checkpoint.iterdir() if checkpoint is not None else ():
                if path.name not in (STATE, OPTIMIZER):
                    shutil.copyfile(path, files.enter_context(new_file(self.directory.path / path.name)))

    def _describe_best(self, best: Path, is_adopted: bool) -> str:
        """One line: the best checkpoint, and whether another state had the best evaluation."""
        progress = read_state(best)["progress"]
        is_kept = (progress.eval_loss, progress.score) == (self.progress.best_loss, self.progress.best_score)
        score = "" if progress.score is None else f", score {progress.score:.1%}"
        lost = "" if is_kept else "; the best evaluation was of a state that was not saved"
        taken = "; its adapter is the run's" if is_adopted else ""
        return f"best checkpoint: {best} (held-out loss {progress.eval_loss:.4f}{score}{lost}{taken})"
