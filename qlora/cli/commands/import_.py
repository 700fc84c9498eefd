"""Convert another tool's adapter to PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class ImportConfig:
    """Convert an adapter of MLX-LM, torchtune, LitGPT, Megatron or minimind to PEFT's format."""

    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Directory or .safetensors file written by one of these tools."""
    output_dir: str | None = None
    """Output directory; must be empty or not exist."""
    model: str | None = None
    """The base, to check names and shapes; required for torchtune, LitGPT and Megatron."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(ImportConfig, program("import"), argv)
    if config.output_dir is None:
        raise InputError("No output directory given; pass --output-dir.")
    from qlora.adapters.load import check_adapter
    from qlora.adapters.other_formats import read_foreign_adapter
    from qlora.adapters.peft_config import PREFIX
    from qlora.adapters.peft_files import AdapterSnapshot, read_adapter, write_adapter
    from qlora.model.hf_config import load_config
    from qlora.model.skeleton import empty_model
    from qlora.system.files import new_directory

    target = Path(config.output_dir)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    model_config = load_config(config.model) if config.model else None
    tensors, description = read_foreign_adapter(config.adapter, config.model, model_config)
    snapshot = AdapterSnapshot({PREFIX + key: t for key, t in tensors.items()}, description, {"format": "pt"})
    with new_directory(target) as staging:
        write_adapter(snapshot, staging)
        saved = replace(read_adapter(staging), directory=Path(config.adapter))  # the name for messages
        if config.model:
            check_adapter(saved, empty_model(config.model))
    variant = saved.config.variant_name
    print(f"{variant} of rank {saved.config.rank} in {len(saved.adapted_layers)} layers saved to {target}")
