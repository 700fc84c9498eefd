"""python -m qlora {train, generate, merge}: the same jobs as train.py, and merging."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.config import parse_args
from qlora.errors import InputError, run


@dataclass
class MergeConfig:
    """Merge an adapter into its base and save an ordinary Hugging Face model."""

    model: str | None = None
    """The base; by default the one that the adapter names."""
    adapter: str | None = None
    """Adapter directory."""
    output_dir: str = "merged"
    """Where to write; must not exist."""
    base: Literal["dequantized", "original"] = "dequantized"
    """Merge onto the weights the adapter was trained against, or onto those before quantization."""
    max_shard_gb: float = 5.0
    """Largest weights file, in GB."""
    drift: bool = True
    """Measure how far the merged model is from base + adapter."""
    debug: bool = False
    """Show the traceback of an error."""


def merge(argv: Sequence[str]) -> None:
    config = parse_args(MergeConfig, "python -m qlora merge", argv)
    if config.adapter is None:
        raise InputError("No adapter given; pass --adapter with the output directory of a run.")
    if not config.max_shard_gb > 0:
        raise InputError(f"max_shard_gb is {config.max_shard_gb}; give --max-shard-gb a number above 0.")
    from qlora.adapter import read_adapter
    from qlora.merge import GB, merge_adapter

    model = config.model or read_adapter(config.adapter)[2].get("base_model_name_or_path")
    if not model:
        raise InputError(f"The adapter {config.adapter} names no base; pass --model.")
    shard = int(config.max_shard_gb * GB)
    drift = merge_adapter(model, config.adapter, config.output_dir, config.base, shard, config.drift)
    print(f"merged model in {config.output_dir}; load it in 16 bits (--no-4bit), see its README.md")
    if drift is not None:
        print(f"drift from base + adapter: {drift}")


def main(argv: Sequence[str]) -> None:
    import train

    commands = {"train": train.main, "generate": train.main, "merge": merge}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    elif list(argv[:1]) in ([], ["-h"], ["--help"]):
        print(f"{__doc__}\n\nusage: python -m qlora COMMAND [--help] [OPTIONS]")
    else:
        raise InputError(f"Unknown command {argv[0]!r}; choose train, generate or merge.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
