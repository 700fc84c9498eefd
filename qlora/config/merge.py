"""Settings of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qlora.config.settings import Read, Settings


@dataclass
class MergeOptions(Settings):
    """How adapters are merged, and how the result is checked."""

    weights: Annotated[tuple[float, ...], Read(lambda _, values: tuple(map(float, values)))] = ()
    """What the update of each adapter is multiplied by; by default 1."""
    base: Literal["dequantized", "original"] = "dequantized"
    """Merge onto the weights the adapter was trained against, or onto those before quantization."""
    save_4bit: bool = False
    """Go back into 4 bits, the codes chosen so that the update survives; by default bf16 is written."""
    calibration: str | None = None
    """Texts to choose the 4-bit codes for: a data file, best the training data; by default a few built-in ones."""
    max_shard_gb: float = 5.0
    """Largest weights file, in GB."""
    drift: bool = True
    """Measure how far the merged model is from base + adapter."""
    drift_text: str | None = None
    """Measure it on the first tokens of this data file (or .txt) instead of on a few built-in texts."""
    max_drift: float | None = None
    """Fail, with nothing written, if the mean KL is above this many nats per token."""
