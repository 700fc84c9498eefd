"""Settings of a merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from qlora.config.settings import Read, Settings
from qlora.system.errors import InputError


@dataclass
class MergeOptions(Settings):
    """How adapters are merged, and how the result is checked."""

    weights: Annotated[tuple[float, ...], Read(lambda _, values: tuple(map(float, values)))] = ()
    """Factor for each adapter's update; default: 1."""
    base: Literal["auto", "dequantized", "original"] = "auto"
    """Merge into the dequantized 4-bit weights, or into the original ones; auto: into those it was trained on."""
    save_4bit: bool = False
    """Write 4-bit weights, with codes chosen so that the update survives, instead of bf16."""
    calibration: str | None = None
    """Data file for choosing the 4-bit codes, ideally the training data; default: built-in texts."""
    max_shard_gb: float = 5.0
    """Largest weights file, in GB."""
    drift: bool = True
    """Measure how far the merged model is from base + adapter."""
    drift_text: str | None = None
    """Measure drift on the first tokens of this data file (or .txt); default: built-in texts."""
    max_drift: float | None = None
    """Fail and write nothing if the mean KL exceeds this many nats per token."""

    def check_bounds(self) -> None:
        """Raise InputError where a bound makes no sense. Whoever merges calls it first."""
        if not self.max_shard_gb > 0:
            raise InputError(f"max_shard_gb is {self.max_shard_gb}; give --max-shard-gb a number above 0.")
        if self.max_drift is not None and not (self.drift and 0 <= self.max_drift < math.inf):
            raise InputError(
                f"max_drift is {self.max_drift}; give --max-drift a number of 0 or more, without --no-drift."
            )
