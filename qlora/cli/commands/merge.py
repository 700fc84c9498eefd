"""Merge adapters into their base and save an ordinary model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class MergeConfig:
    """Merge adapters into their base and save an ordinary Hugging Face model."""

    model: str | None = None
    """The base; by default the one that the (first) adapter names."""
    adapter: tuple[str, ...] = ()
    """Adapter directory, or several, whose updates add up."""
    weights: tuple[float, ...] = ()
    """What the update of each adapter is multiplied by; by default 1."""
    output_dir: str = "merged"
    """Where to write; must not exist."""
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
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(MergeConfig, program("merge"), argv)
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
    print(f"merged model in {config.output_dir}; load it {how}, see its README.md")
    if drift is not None:
        print(f"drift from base + adapter: {drift}")
