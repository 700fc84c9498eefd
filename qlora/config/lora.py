"""Settings of the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from qlora.config.fields import fits_pattern, layer_number, names_layer, to_text
from qlora.config.settings import (
    ABOVE_ZERO,
    Alphas,
    Count,
    Layers,
    Names,
    Positive,
    Ranks,
    Settings,
    Targets,
    at_least,
    between,
    hints_of,
    read_value,
)
from qlora.system.errors import InputError

BASE_STARTS = ("pissa", "loftq")  # may change the base; lora/svd_start.py
STARTS = ("kaiming", "gaussian", *BASE_STARTS)
# Flags of variants and their names in the field; the objects behind the flags are in lora/variants.py.
VARIANTS = {"use_adalora": "AdaLoRA", "use_dora": "DoRA", "use_rslora": "rsLoRA"}
DEFAULT_TARGETS = ("q_proj", "v_proj")
WHOLE_LAYERS = ("use_dora", "use_adalora")  # variants that tensor parallelism does not support


@dataclass
class LoRAConfig(Settings):
    """The adapter: y = W x + (alpha / rank) B A x."""

    rank: Annotated[int, at_least(1, "a whole number of 1 or more")] = 8
    """Rows of A and columns of B."""
    alpha: Annotated[float, ABOVE_ZERO] = 16.0
    """Scale of the update, as alpha / rank."""
    dropout: Annotated[float, between(0, 1, "a number from 0 up to, not including, 1")] = 0.0
    """Probability of dropping an input of A while training."""
    target_modules: Targets = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """Linear layers to adapt: names or patterns separated by commas, or all-linear. GPT-2's default is c_attn."""
    exclude_modules: Targets = field(default_factory=list)
    """Of these layers, those to leave alone: names or patterns separated by commas."""
    layers: Layers = field(default_factory=list)
    """Adapt only these decoder layers, counted from 0: 8-15, or 0,2,4-7; all if empty."""
    rank_pattern: Ranks = field(default_factory=dict)
    """Other ranks for some layers, as name=rank,...: a name's end or a pattern, the first that fits wins."""
    alpha_pattern: Alphas = field(default_factory=dict)
    """Other alphas for some layers, as name=alpha,..."""
    adapter_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of A and B; the optimizer always works in fp32."""
    init: Literal["kaiming", "gaussian", "pissa", "loftq"] = "kaiming"
    """How A and B start: with B at zero, or (pissa) from the weight's largest singular values, or (loftq) from its
    quantization error."""
    init_std: Annotated[float | None, ABOVE_ZERO] = None
    """Standard deviation of A under --init gaussian; 1 / rank if not given."""
    kaiming_a: Annotated[float | None, at_least(0)] = None
    """Slope a under --init kaiming: A is uniform within sqrt(6 / ((1 + a^2) inputs)); sqrt(5) if not given, as in
    nn.Linear."""
    loftq_iterations: Positive = 1
    """Rounds of quantizing and refitting under --init loftq; with one the base stays as it is."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn too (rsLoRA)."""
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA)."""
    use_adalora: bool = False
    """Move the ranks to the layers that need them while training (AdaLoRA); --rank is where they start."""
    adalora_target_rank: Count = 0
    """Mean rank of a layer at the end of AdaLoRA; 0 = half of --rank."""
    adalora_start: float = 0.1
    """Share of the steps after which AdaLoRA begins to take ranks away."""
    adalora_end: float = 0.7
    """Share of the steps after which the ranks stay as they are."""
    adalora_interval: Positive = 10
    """Steps between two choices of the triplets to keep."""
    lora_plus_ratio: Annotated[float, ABOVE_ZERO] = 1.0
    """Learning rate of B over that of A (LoRA+; its authors take 16)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train no biases, all of the model's, or those of the adapted layers."""
    modules_to_save: Names = field(default_factory=list)
    """Modules to train whole: embed_tokens, lm_head (either means both where they are tied), norm, ..."""
    new_tokens: Names = field(default_factory=list)
    """Tokens to add to the vocabulary, separated by commas; embeddings and head then train, too."""

    def check(self) -> None:
        if self.adalora_target_rank > self.rank:
            raise InputError(
                f"adalora_target_rank is {self.adalora_target_rank}; give --adalora-target-rank a number from 0 "
                f"to --rank, {self.rank}."
            )
        if not 0 <= self.adalora_start < self.adalora_end <= 1:
            raise InputError(
                f"adalora_start is {self.adalora_start} and adalora_end {self.adalora_end}; give shares of "
                "the steps from 0 to 1, the start first."
            )
        for name, init in (("init_std", "gaussian"), ("kaiming_a", "kaiming")):
            if getattr(self, name) is not None and self.init != init:
                raise InputError(f"{name} is for init {init}, but init is {self.init}; leave out one of them.")
        others = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
        if self.use_adalora and (self.init != "kaiming" or any(getattr(self, name) for name in others)):
            raise InputError(f"use_adalora sets start, ranks and scale; leave out init, {', '.join(others)}.")

    @property
    def starts_from_base(self) -> bool:
        """Whether A and B start from the base's weights, which may change the base (PiSSA, LoftQ)."""
        return self.init in BASE_STARTS

    @property
    def variant_name(self) -> str:
        """The variant's name in the field."""
        return " + ".join(name for flag, name in VARIANTS.items() if getattr(self, flag)) or "LoRA"

    def variant(self) -> dict[str, Any]:
        """Rank, alpha, dropout, and all else of the adapter's maths that is not the default; lists as text."""
        always, elsewhere = ("rank", "alpha", "dropout"), ("target_modules", "adapter_dtype", "init")
        default = vars(LoRAConfig())
        return {
            name: to_text(value)
            for name, value in vars(self).items()
            if name in always or (name not in elsewhere and value != default[name])
        }

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its qualified name."""
        return next((r for key, r in self.rank_pattern.items() if fits_pattern(layer, key)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """The alpha of a layer, by its qualified name."""
        return next((a for key, a in self.alpha_pattern.items() if fits_pattern(layer, key)), self.alpha)

    @property
    def scaling(self) -> float:
        """What B A is multiplied by, where no pattern gives a layer another rank or alpha."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def should_adapt(self, layer: str) -> bool:
        """Whether this configuration names a linear layer, by its qualified name, which is not the output head."""
        targets = self.target_modules
        if targets != ["all-linear"] and not any(names_layer(layer, target) for target in targets):
            return False
        if any(names_layer(layer, target) for target in self.exclude_modules):
            return False
        return not self.layers or layer_number(layer) in self.layers

    def scaling_of(self, layer: str, rank: int) -> float:
        """What B A is multiplied by in a layer of this rank (AdaLoRA: by the rank it began with)."""
        if self.use_adalora:
            return self.alpha / (self.rank + 1e-5)  # PEFT's guard against a rank of zero
        return self.alpha_of(layer) / (math.sqrt(rank) if self.use_rslora else rank)


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings with lists and maps spelled as `LoRAConfig.variant` spells them."""
    hints = hints_of(LoRAConfig)
    return {
        name: to_text(read_value(name, hints[name], value)) if name in hints and type(value) is str else value
        for name, value in settings.items()
    }
