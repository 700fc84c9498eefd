"""All settings of a run, and the checks across groups of settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qlora.config.data import DataConfig
from qlora.config.fields import to_text
from qlora.config.generate import GenerateConfig
from qlora.config.loop import LoopConfig
from qlora.config.lora import WHOLE_LAYERS, LoRAConfig
from qlora.config.model import CalibrationConfig, ModelConfig
from qlora.config.optimizer import OptimizerConfig
from qlora.config.parallel import ParallelConfig
from qlora.config.preferences import REFERRING, PreferenceConfig
from qlora.config.saving import SavingConfig
from qlora.config.settings import Settings
from qlora.config.watching import WatchingConfig
from qlora.system.errors import InputError

TRAINING = ("preference", "loop", "optimizer", "watching", "saving")


@dataclass
class RunConfig(Settings):
    """Fine-tune a 4-bit base with LoRA, or answer a --prompt with one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    watching: WatchingConfig = field(default_factory=WatchingConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def keeps_best(self) -> bool:
        """Whether a setting needs the best state as a checkpoint, however often others are saved."""
        watching = self.watching
        return self.saving.load_best or watching.early_stopping_patience > 0 or watching.best_metric != "eval_loss"

    @property
    def row_tokens(self) -> int:
        """The most tokens of a row: --max-length, of a row of preferences twice that."""
        return self.data.max_length * (1 if self.preference.objective == "sft" else 2)

    @property
    def trained_tokens(self) -> int:
        """The most tokens of a row in the pass that trains: KTO's second sequence only passes forward."""
        return self.data.max_length if self.preference.objective == "kto" else self.row_tokens

    @property
    def scored_tokens(self) -> int:
        """The most tokens of a row in a step's passes without gradients."""
        other = self.row_tokens - self.trained_tokens
        return other + (self.row_tokens if self.preference.reference_each_step else 0)

    def saved(self) -> dict[str, Any]:
        """The sections of run.json and of checkpoints: the five of training are one there, `train`; lists and
        maps are text."""
        sections: dict[str, Any] = {}
        for group, values in asdict(self).items():
            if group in TRAINING:
                sections.setdefault("train", {}).update(values)
            else:
                sections[group] = values
        for values in sections.values():
            if isinstance(values, dict):
                values.update({name: to_text(value) for name, value in values.items()})
        return sections

    def check_training(self) -> None:
        """Whether the settings of a training run go together.

        Raises:
            InputError: they do not.
        """
        watching, held_out = self.watching, self.data.eval_data is not None or self.data.eval_split > 0
        if watching.eval_every and not held_out:
            raise InputError(
                "--eval-every needs held-out data; pass --eval-data FILE, or --eval-split 0.05 for a share."
            )
        if self.keeps_best and not watching.eval_every:
            asked = {
                "--early-stopping-patience": watching.early_stopping_patience > 0,
                "--load-best": self.saving.load_best,
                "--best-metric": True,
            }
            flag = next(flag for flag, is_asked in asked.items() if is_asked)
            raise InputError(f"{flag} goes by evaluations; pass --eval-every N with it.")
        if watching.best_metric == "exact_match" and self.data.train_on == "all":
            raise InputError(
                "--best-metric exact_match needs answers apart from their prompts; leave out --train-on all."
            )
        self.check_preferences()
        self.check_split()
        self.check_calibration()
        if self.generate.adapter is not None and self.lora.new_tokens:
            raise InputError("--new-tokens begins an adapter, --adapter goes on with one; leave out one of them.")

    def check_calibration(self) -> None:
        """Whether --calibrate goes with the other settings.

        Raises:
            InputError: it does not.
        """
        if self.calibration.calibrate == "off":
            return
        others = {
            "--no-4bit": not self.model.use_4bit,
            "--no-cache": not self.model.cache,
            f"--init {self.lora.init}": self.lora.starts_from_base,
            "--adapter": self.generate.adapter is not None,  # its own base is used
        }
        for other in (flag for flag, is_given in others.items() if is_given):
            raise InputError(f"--calibrate and {other} do not go together; leave out one of them.")

    def check_preferences(self) -> None:
        """Whether the settings go with the objective.

        Raises:
            InputError: they do not.
        """
        own, data = self.preference, self.data
        own.check_objective()
        if own.objective == "sft":
            if self.watching.best_metric == "accuracy":
                raise InputError(
                    "--best-metric accuracy compares answers; pass --objective dpo or another with it."
                )
            return
        if data.train_on != "completion":
            raise InputError(
                f"--train-on means nothing to --objective {own.objective}, which learns the answers that differ; "
                "leave it out."
            )
        if own.objective == "kto" and self.watching.best_metric == "exact_match":
            raise InputError(
                "--best-metric exact_match needs right answers; with kto pass --best-metric accuracy."
            )
        if own.objective in REFERRING and self.lora.new_tokens:
            raise InputError(
                f"--new-tokens are unknown to the reference of --objective {own.objective}; train them with "
                "--objective sft first, or pass orpo or simpo."
            )
        if own.reference_each_step and self.lora.starts_from_base:
            raise InputError(
                f"--reference-each-step needs the base as it was; leave it out with --init {self.lora.init}."
            )

    def check_split(self) -> None:
        """Whether a base that is split can do what is asked.

        Raises:
            InputError: it cannot.
        """
        parallel, lora = self.parallel, self.lora
        is_tensor = parallel.tensor_parallel > 1
        unable = {
            "--target-modules lm_head": any(t.rpartition(".")[2] == "lm_head" for t in lora.target_modules),
            "--modules-to-save": bool(lora.modules_to_save),
            "--new-tokens": bool(lora.new_tokens),
            f"--bias {lora.bias}": lora.bias != "none",
            f"--init {lora.init}": lora.starts_from_base,
            **{f"--{name.replace('_', '-')}": getattr(lora, name) and is_tensor for name in WHOLE_LAYERS},
            "--no-4bit": not self.model.use_4bit and is_tensor,
            "--reference-each-step": self.preference.reference_each_step,
            "--best-metric exact_match": self.watching.best_metric == "exact_match",
        }
        for other in (flag for flag, is_asked in unable.items() if is_asked and parallel.is_split):
            raise InputError(f"{other} needs the whole base on every device; leave it out, or {parallel.flag}.")
