"""Say what is in a data file, and what a run would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from qlora.config.data import DataConfig
from qlora.config.parse import parse_args
from qlora.config.settings import Columns, Settings, at_least
from qlora.system.errors import InputError


@dataclass
class CheckDataConfig(Settings):
    """Say what is in a data file, and what a run would make of it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .jsonl, .json, .csv or .parquet file, or a hub id."""
    model: str | None = None
    """Count in tokens of this model, of which only the tokenizer is loaded."""
    max_length: Annotated[int, at_least(2)] = DataConfig.max_length
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = DataConfig.on_long
    """A longer example keeps its first --max-length tokens, or is dropped."""
    train_on: Literal["completion", "all"] = DataConfig.train_on
    """Learn the assistant's turns only, or every token."""
    parse_special: bool = DataConfig.parse_special
    """Let text that spells a special token inside a message be that token instead of plain text."""
    columns: Columns = field(default_factory=dict)
    """Columns that go by another name, as prompt=question,completion=answer."""
    chat_template: str | None = None
    """File of a Jinja chat template to use in the place of the tokenizer's."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(CheckDataConfig, "python -m qlora check-data", argv)
    if config.chat_template is not None and config.model is None:
        raise InputError("--chat-template needs a tokenizer; pass --model.")
    from qlora.cli.show_check import print_check
    from qlora.data.check import check_data
    from qlora.data.row_encoder import set_chat_template
    from qlora.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model) if config.model else None
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    options = (config.max_length, config.train_on, config.on_long, config.parse_special, config.columns)
    found = check_data(config.data, tokenizer, *options)
    print_check(found)
    if found.bad_rows:
        raise InputError(
            f"{len(found.bad_rows):,} of {found.num_rows:,} rows of {config.data} cannot be used; mend them, or "
            "train without them by --on-bad-row skip."
        )
