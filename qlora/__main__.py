"""python -m qlora {train, generate, merge, check-data}: the same jobs as train.py; merging; a look at data."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from qlora.config import DataConfig, parse_args
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
    from qlora.merge import GB, base_model_of, merge_adapter

    model = config.model or base_model_of(config.adapter)
    shard = int(config.max_shard_gb * GB)
    drift = merge_adapter(model, config.adapter, config.output_dir, config.base, shard, config.drift)
    print(f"merged model in {config.output_dir}; load it in 16 bits (--no-4bit), see its README.md")
    if drift is not None:
        print(f"drift from base + adapter: {drift}")


@dataclass
class CheckDataConfig:
    """Say what is in a data file, and what a run would make of it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .jsonl, .json, .csv or .parquet file, or a hub id."""
    model: str | None = None
    """Count in tokens of this model, of which only the tokenizer is loaded."""
    max_length: int = DataConfig.max_length
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = DataConfig.on_long
    """A longer example keeps its first --max-length tokens, or is dropped."""
    train_on: Literal["completion", "all"] = DataConfig.train_on
    """Learn the assistant's turns only, or every token."""
    parse_special: bool = DataConfig.parse_special
    """Let text that spells a special token inside a message be that token instead of plain text."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        DataConfig(max_length=self.max_length)  # the same range


def check(argv: Sequence[str]) -> None:
    config = parse_args(CheckDataConfig, "python -m qlora check-data", argv)
    from qlora.check_data import check_data, print_check
    from qlora.model import load_tokenizer

    tokenizer = load_tokenizer(config.model) if config.model else None
    options = (config.max_length, config.train_on, config.on_long, config.parse_special)
    found = check_data(config.data, tokenizer, *options)
    print_check(found)
    if found.bad_rows:
        raise InputError(
            f"{len(found.bad_rows):,} of {found.num_rows:,} rows of {config.data} cannot be used; mend them, or "
            "train without them by --on-bad-row skip."
        )


def main(argv: Sequence[str]) -> None:
    import train

    commands = {"train": train.main, "generate": train.main, "merge": merge, "check-data": check}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    elif list(argv[:1]) in ([], ["-h"], ["--help"]):
        print(f"{__doc__}\n\nusage: python -m qlora COMMAND [--help] [OPTIONS]")
    else:
        raise InputError(f"Unknown command {argv[0]!r}; choose train, generate, merge or check-data.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
