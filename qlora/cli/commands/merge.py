"""Merge adapters into their base and save an ordinary model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class MergeConfig:
    """Merge adapters into their base and save an ordinary Hugging Face model."""

    model: str | None = None
    """The base; default: the one that the first adapter names."""
    adapter: tuple[str, ...] = ()
    """One or more adapter directories; their updates are added."""
    weights: tuple[float, ...] = ()
    """Factor for each adapter's update; default: 1."""
    output_dir: str = "merged"
    """Output directory; must not exist."""
    base: Literal["dequantized", "original"] = "dequantized"
    """Merge into the dequantized weights that the adapter was trained on, or into the original ones."""
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
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(MergeConfig, "python -m qlora merge", argv)
    if not config.adapter:
        raise InputError("No adapter given; pass --adapter with the output directory of a run.")
    if not config.max_shard_gb > 0:
        raise InputError(f"max_shard_gb is {config.max_shard_gb}; give --max-shard-gb a number above 0.")
    from qlora.adapters.provenance import base_model_of
    from qlora.export.merge import merge_adapter
    from qlora.export.merged_weights import GB

    drift = merge_adapter(
        config.model or base_model_of(config.adapter[0]),
        config.adapter,
        config.output_dir,
        config.base,
        int(config.max_shard_gb * GB),
        config.drift,
        weights=config.weights or None,
        save_4bit=config.save_4bit,
        calibration=config.calibration,
        drift_text=config.drift_text,
        max_drift=config.max_drift,
    )
    how = "in 4 bits" if config.save_4bit else "in 16 bits (--no-4bit)"
    print(f"Merged model saved to {config.output_dir}; load it {how}, see its README.md")
    if drift is not None:
        print(f"Drift from base + adapter: {drift}")
