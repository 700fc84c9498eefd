"""Merge adapters into their base and save an ordinary model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.cli.program import program
from qlora.config.merge import MergeOptions
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class MergeConfig(MergeOptions):
    """Merge adapters into their base and save an ordinary Hugging Face model."""

    model: str | None = None
    """The base; default: the one that the first adapter names."""
    adapter: tuple[str, ...] = ()
    """One or more adapter directories; their updates are added."""
    output_dir: str = "merged"
    """Output directory; must not exist."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(MergeConfig, program("merge"), argv)
    if not config.adapter:
        raise InputError("No adapter given; pass --adapter with the output directory of a run.")
    config.check_bounds()
    from qlora.adapters.provenance import base_model_of
    from qlora.export.merge import merge_adapter

    model = config.model or base_model_of(config.adapter[0])
    drift = merge_adapter(model, config.adapter, config.output_dir, config)
    how = "in 4 bits" if config.save_4bit else "in 16 bits (--no-4bit)"
    print(f"Merged model saved to {config.output_dir}; load it {how}, see its README.md")
    if drift is not None:
        print(f"Drift from base + adapter: {drift}")
