"""Settings of the frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qlora.config.settings import Settings, at_least

ComputeDtype = Literal["auto", "float32", "bfloat16"]


@dataclass
class ModelConfig(Settings):
    """Base model."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file."""
    use_4bit: bool = True
    """Quantize the base to 4 bits; --no-4bit loads it in bf16 for plain LoRA."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels of a 4-bit weight: normal quantiles (nf4) or a tiny float (fp4)."""
    double_quant: bool = True
    """Quantize the block scales too."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations; auto picks the faster one on this device by measuring."""
    cache: bool = True
    """Keep the quantized base on disk ($QLORA_CACHE, else ~/.cache/qlora) for the next start."""


@dataclass
class CalibrationConfig(Settings):
    """Calibration of the base."""

    calibrate: str = "off"
    """Choose the 4-bit codes by what the layers compute: auto = on the first rows of --data, FILE = on the
    rows of this file; off = the nearest codes. Takes minutes at the first start."""
    calibrate_tokens: Annotated[int, at_least(2048)] = 16384
    """Tokens of text for --calibrate."""
