"""The output directory of a run: who writes what, when, and how a run finds its way back in.

    OUTPUT_DIR/run.json                  every setting, to reproduce it
               metrics.jsonl, loss.png   one line per optimizer step; the curve at the end
               adapter_model.safetensors, adapter_config.json
               checkpoints/step-N/       full state

All processes of a run hold a `RunOutput`; only the main one writes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from qlora.adapter import save_adapter
from qlora.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from qlora.config import LoRAConfig
from qlora.errors import InputError, TrainingStopped
from qlora.lora import lora_layers
from qlora.optim import MasterOptimizer
from qlora.report import RunDisplay, plot_loss
from qlora.tokenize import Example


class RunOutput:
    """Writes metrics, checkpoints, adapter and curve of one run.

    Args:
        output_dir: made if absent. A directory with metrics or an adapter of another run is refused unless
            this run resumes in it.
        base_model: recorded in the adapter.
        resume: None, "auto" or a checkpoint directory.
        run: every setting, written to run.json.
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
    ) -> None:
        self.directory, self.base_model, self.accelerator = Path(output_dir), base_model, accelerator
        self.checkpoint = find_checkpoint(resume, self.directory) if resume else None
        self.start_step, self.run = 0, run
        if accelerator.is_main_process:
            self._claim(resume)
        accelerator.wait_for_everyone()

    def _claim(self, resume: str | None) -> None:
        if resume is None and (self.directory / "metrics.jsonl").exists():
            raise InputError(
                f"--output-dir {self.directory} holds another run; pass --resume auto to continue it, "
                "or choose another directory."
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass  # it can be written to
        except OSError as error:
            raise InputError(
                f"--output-dir {self.directory} cannot be written ({error}); choose another."
            ) from error

    def compute_dtype(self, asked: str) -> str:
        """The compute dtype of a resumed run is the one it began with: measuring again could choose another."""
        if self.checkpoint is None or asked != "auto":
            return asked
        return str(read_state(self.checkpoint)["settings"].get("compute_dtype", asked))

    def begin(
        self,
        model: nn.Module,
        lora_config: LoRAConfig,
        make_optimizer: Callable[[], MasterOptimizer],
        settings: dict[str, Any],
        total_steps: int,
    ) -> MasterOptimizer:
        """The optimizer of a fresh or resumed run; sets `start_step` and begins metrics.jsonl.

        Args:
            settings: what a resumed run must share with the checkpoint.
        """
        self.model, self.lora_config, self.settings = model, lora_config, settings
        if self.checkpoint is not None:
            self.start_step, self.optimizer = load_checkpoint(self.checkpoint, model, make_optimizer, settings)
            self.accelerator.print(f"resumed from {self.checkpoint}, {self.start_step} steps done")
        else:
            self.optimizer = make_optimizer()
        quiet = not self.accelerator.is_main_process
        self.display = RunDisplay(total_steps, self.start_step, quiet)
        if not quiet:
            (self.directory / "run.json").write_text(json.dumps(self.run, indent=2) + "\n")
            self._metrics = _open_metrics(self.directory / "metrics.jsonl", self.start_step)
        return self.optimizer

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and show it."""
        if self.accelerator.is_main_process:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            self.display.show(line)

    def save(self, step: int) -> None:
        """Write the state after `step` steps as a checkpoint, and its adapter as the run's adapter.

        Raises:
            TrainingStopped: steps were made, but no adapter's B has left zero: nothing was learned.
        """
        if step > 0 and not any(layer.lora_B.any() for layer in lora_layers(self.model).values()):
            raise TrainingStopped(f"After {step} steps every lora_B is still zero, so the adapter does nothing.")
        if self.accelerator.is_main_process:
            path = checkpoint_path(self.directory, step)
            save_checkpoint(
                path, step, self.model, self.optimizer, self.lora_config, self.settings, self.base_model
            )
            save_adapter(self.model, self.directory, self.lora_config, self.base_model)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Draw the loss curve; called also after a run that stopped."""
        if self.accelerator.is_main_process:
            self.display.close()
            self._metrics.close()
            plot_loss(self.directory / "metrics.jsonl", self.directory / "loss.png")


def _open_metrics(path: Path, start_step: int) -> Any:
    """Open metrics.jsonl for appending; lines of steps that will be done again are dropped first."""
    kept = []
    if start_step and path.is_file():
        whole = (line for line in path.read_text().splitlines() if line.endswith("}"))
        kept = [line for line in whole if json.loads(line)["step"] <= start_step]
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a")


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Identity of the tokenised training data, order included."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.numpy().tobytes() + b"|" + example.targets.numpy().tobytes())
    return digest.hexdigest()[:16]
