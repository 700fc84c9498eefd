"""Show what is in a data file and how a run would use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from qlora.config.data import DataConfig
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class CheckDataConfig:
    """Show what is in a data file and how a run would use it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .jsonl, .json, .csv or .parquet file, or a hub id."""
    model: str | None = None
    """Count tokens with this model's tokenizer; nothing else of it is loaded."""
    max_length: int = DataConfig.max_length
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = DataConfig.on_long
    """Cut a longer example to its first --max-length tokens, or drop it."""
    train_on: Literal["completion", "all"] = DataConfig.train_on
    """Train on the assistant's turns only, or on every token."""
    parse_special: bool = DataConfig.parse_special
    """Parse special tokens spelled inside a message; by default they are plain text."""
    columns: str = DataConfig.columns
    """Rename columns, as in prompt=question,completion=answer."""
    chat_template: str | None = None
    """Jinja chat template file to use instead of the tokenizer's."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        DataConfig(max_length=self.max_length)  # the same range


def main(argv: Sequence[str]) -> None:
    config = parse_args(CheckDataConfig, "python -m qlora check-data", argv)
    if config.chat_template is not None and config.model is None:
        raise InputError("--chat-template needs a tokenizer; pass --model.")
    columns = DataConfig(columns=config.columns).column_names
    from qlora.cli.show_check import print_check
    from qlora.data.check import check_data
    from qlora.data.row_encoder import set_chat_template
    from qlora.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model) if config.model else None
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    options = (config.max_length, config.train_on, config.on_long, config.parse_special, columns)
    found = check_data(config.data, tokenizer, *options)
    print_check(found)
    if found.bad_rows:
        raise InputError(
            f"{len(found.bad_rows):,} of {found.num_rows:,} rows of {config.data} cannot be used; fix them, or "
            "train without them: --on-bad-row skip."
        )
