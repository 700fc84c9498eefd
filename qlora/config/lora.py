"""Settings of the adapter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from qlora.config.fields import fits_pattern, join_fields, read_pattern, split_names
from qlora.system.errors import InputError

BASE_STARTS = ("pissa", "loftq")  # those that may change the base; lora/svd_start.py
STARTS = ("kaiming", "gaussian", *BASE_STARTS)
# Flags of variants and their names in the field; the objects behind the flags are in lora/variants.py.
VARIANTS = {"use_adalora": "AdaLoRA", "use_dora": "DoRA", "use_rslora": "rsLoRA"}
WHOLE_LAYERS = ("use_dora", "use_adalora")  # variants that tensor parallel does not compute


@dataclass
class LoRAConfig:
    """The adapter: y = W x + (alpha / rank) B A x."""

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """Scale of the update, as alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    target_modules: str = "q_proj,v_proj"
    """Linear layers to adapt: names separated by commas, or all-linear."""
    layers: str = ""
    """Adapt only these decoder layers, counted from 0: 8-15, or 0,2,4-7; all if empty."""
    rank_pattern: str = ""
    """Other ranks for some layers, as name=rank,...: a name's end or a pattern, the first that fits wins."""
    alpha_pattern: str = ""
    """Other alphas for some layers, as name=alpha,..."""
    adapter_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of A and B; the optimizer always works in fp32."""
    init: Literal["kaiming", "gaussian", "pissa", "loftq"] = "kaiming"
    """How A and B start: with B at zero, or (pissa) from the weight's largest singular values, or (loftq) from its
    quantization error."""
    loftq_iterations: int = 1
    """Rounds of quantizing and refitting under --init loftq; with one the base stays as it is."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn too (rsLoRA)."""
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA)."""
    use_adalora: bool = False
    """Move the ranks to the layers that need them while training (AdaLoRA); --rank is where they start."""
    adalora_target_rank: int = 0
    """Mean rank of a layer at the end of AdaLoRA; 0 = half of --rank."""
    adalora_start: float = 0.1
    """Share of the steps after which AdaLoRA begins to take ranks away."""
    adalora_end: float = 0.7
    """Share of the steps after which the ranks stay as they are."""
    adalora_interval: int = 10
    """Steps between two choices of the triplets to keep."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+; its authors take 16)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train no biases, all of the model's, or those of the adapted layers."""
    modules_to_save: str = ""
    """Modules to train whole: embed_tokens, lm_head (either means both where they are tied), norm, ..."""
    new_tokens: str = ""
    """Tokens to add to the vocabulary, separated by commas; embeddings and head then train, too."""

    def __post_init__(self) -> None:
        join_fields(self)
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; give --rank a whole number of 1 or more.")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha}; give --alpha a number above 0.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; give --dropout a number from 0 up to, not including, 1.")
        for name, value, choices in (
            ("adapter_dtype", self.adapter_dtype, ("bfloat16", "float32")),
            ("init", self.init, STARTS),
            ("bias", self.bias, ("none", "all", "lora_only")),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        if self.loftq_iterations < 1:
            raise InputError(f"loftq_iterations is {self.loftq_iterations}; give --loftq-iterations 1 or more.")
        if self.adalora_target_rank < 0 or self.adalora_target_rank > self.rank:
            raise InputError(
                f"adalora_target_rank is {self.adalora_target_rank}; give --adalora-target-rank a number from 0 "
                f"to --rank, {self.rank}."
            )
        if not 0 < self.lora_plus_ratio < math.inf:
            raise InputError(
                f"lora_plus_ratio is {self.lora_plus_ratio}; give --lora-plus-ratio a number above 0."
            )
        if not 0 <= self.adalora_start < self.adalora_end <= 1:
            raise InputError(
                f"adalora_start is {self.adalora_start} and adalora_end {self.adalora_end}; give shares of "
                "the steps from 0 to 1, the start first."
            )
        if self.adalora_interval < 1:
            raise InputError(f"adalora_interval is {self.adalora_interval}; give --adalora-interval 1 or more.")
        others = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
        if self.use_adalora and (self.init != "kaiming" or any(getattr(self, name) for name in others)):
            raise InputError(f"use_adalora sets start, ranks and scale; leave out init, {', '.join(others)}.")
        _ = self.layer_numbers, self.rank_patterns, self.alpha_patterns  # each raises if it does not read

    @property
    def starts_from_base(self) -> bool:
        """Whether A and B start from the base's weights, which may change the base (PiSSA, LoftQ)."""
        return self.init in BASE_STARTS

    @property
    def variant_name(self) -> str:
        """The variant's name in the field."""
        return " + ".join(name for flag, name in VARIANTS.items() if getattr(self, flag)) or "LoRA"

    @property
    def targets(self) -> list[str]:
        """The target names, split and stripped."""
        return split_names(self.target_modules)

    @property
    def trained_modules(self) -> list[str]:
        """The names of modules that train whole."""
        return split_names(self.modules_to_save)

    @property
    def added_tokens(self) -> list[str]:
        """The tokens to add to the vocabulary."""
        return split_names(self.new_tokens)

    @property
    def layer_numbers(self) -> list[int] | None:
        """The decoder layers to adapt; None = all."""
        numbers: list[int] = []
        for part in split_names(self.layers):
            match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise InputError(f"layers is {self.layers!r}; give --layers numbers and ranges, such as 0,2,4-7.")
            numbers += range(first, last + 1)
        return numbers or None

    @property
    def rank_patterns(self) -> dict[str, int]:
        """Name or pattern -> rank."""
        numbers = read_pattern("rank_pattern", self.rank_pattern)
        for key, number in numbers.items():
            if number != int(number):
                raise InputError(f"rank_pattern gives {key} the rank {number}; give a whole number.")
        return {key: int(number) for key, number in numbers.items()}

    @property
    def alpha_patterns(self) -> dict[str, float]:
        """Name or pattern -> alpha."""
        return dict(read_pattern("alpha_pattern", self.alpha_pattern))

    def variant(self) -> dict[str, Any]:
        """Rank, alpha, dropout, and every other setting of the adapter's maths that is not the default."""
        always, elsewhere = ("rank", "alpha", "dropout"), ("target_modules", "adapter_dtype", "init")
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name in always or (item.name not in elsewhere and getattr(self, item.name) != item.default)
        }

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its qualified name."""
        return next((r for key, r in self.rank_patterns.items() if fits_pattern(layer, key)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """The alpha of a layer, by its qualified name."""
        return next((a for key, a in self.alpha_patterns.items() if fits_pattern(layer, key)), self.alpha)

    def scaling_of(self, layer: str, rank: int) -> float:
        """What B A is multiplied by in a layer of this rank (AdaLoRA: by the rank it began with)."""
        if self.use_adalora:
            return self.alpha / (self.rank + 1e-5)  # PEFT's guard against a rank of zero
        return self.alpha_of(layer) / (math.sqrt(rank) if self.use_rslora else rank)
