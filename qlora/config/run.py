"""All settings of a run, and the checks that need more than one group of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora.config.data import DataConfig
from qlora.config.generate import GenerateConfig
from qlora.config.lora import WHOLE_LAYERS, LoRAConfig
from qlora.config.model import ModelConfig
from qlora.config.parallel import ParallelConfig
from qlora.config.train import TrainConfig
from qlora.system.errors import InputError


@dataclass
class RunConfig:
    """Fine-tune a 4-bit base with LoRA, or answer a --prompt with one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    debug: bool = False
    """Show the traceback of an error."""

    def check_training(self) -> None:
        """Whether the settings of a training run go together.

        Raises:
            InputError: they do not.
        """
        t, held_out = self.train, self.data.eval_data is not None or self.data.eval_split > 0
        if t.eval_every and not held_out:
            raise InputError(
                "--eval-every needs held-out data; pass --eval-data FILE, or --eval-split 0.05 for a share."
            )
        if t.keeps_best and not t.eval_every:
            names = ("early_stopping_patience", "load_best")
            flag = next((n for n in names if getattr(t, n)), "best_metric").replace("_", "-")
            raise InputError(f"--{flag} goes by evaluations; pass --eval-every N with it.")
        if t.best_metric == "exact_match" and self.data.train_on == "all":
            raise InputError(
                "--best-metric exact_match needs answers apart from their prompts; leave out --train-on all."
            )
        self.check_split()
        if self.generate.adapter is not None and self.lora.added_tokens:
            raise InputError("--new-tokens begins an adapter, --adapter goes on with one; leave out one of them.")

    def check_split(self) -> None:
        """Whether a base that is split can do what is asked.

        Raises:
            InputError: it cannot.
        """
        parallel, lora = self.parallel, self.lora
        is_tensor = parallel.tensor_parallel > 1
        unable = {
            "--modules-to-save": bool(lora.trained_modules),
            "--new-tokens": bool(lora.added_tokens),
            f"--bias {lora.bias}": lora.bias != "none",
            f"--init {lora.init}": lora.starts_from_base,
            **{f"--{name.replace('_', '-')}": getattr(lora, name) and is_tensor for name in WHOLE_LAYERS},
            "--no-4bit": not self.model.use_4bit and is_tensor,
            "--best-metric exact_match": self.train.best_metric == "exact_match",
        }
        for other in (flag for flag, is_asked in unable.items() if is_asked and parallel.is_split):
            raise InputError(f"{other} needs the whole base on every device; leave it out, or {parallel.flag}.")
