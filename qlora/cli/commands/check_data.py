"""Show what is in a data file and how a run would use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from qlora.cli.program import program
from qlora.config.data import RowsConfig
from qlora.config.parse import parse_args
from qlora.config.preferences import Objective
from qlora.system.errors import InputError


@dataclass
class CheckDataConfig(RowsConfig):
    """Show what is in a data file and how a run would use it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field()  # type: ignore[assignment]
    """A .jsonl, .json, .csv or .parquet file, or a hub id."""
    objective: Objective = "sft"
    """What a run would learn: single answers (sft), pairs (dpo, ipo, orpo, simpo) or labelled answers (kto)."""
    model: str | None = None
    """Count tokens with this model's tokenizer; nothing else of it is loaded."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(CheckDataConfig, program("check-data"), argv)
    if config.chat_template is not None and config.model is None:
        raise InputError("--chat-template needs a tokenizer; pass --model.")
    from qlora.cli.show_check import print_check
    from qlora.data.check import check_data
    from qlora.data.preferences import kind_of
    from qlora.data.row_encoder import set_chat_template
    from qlora.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model) if config.model else None
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    options = (config.max_length, config.train_on, config.on_long, config.parse_special, config.columns)
    kind = kind_of(config.objective)
    found = check_data(config.data, tokenizer, *options, kind)
    print_check(found)
    if found.bad_rows:
        raise InputError(
            f"{len(found.bad_rows):,} of {found.num_rows:,} rows of {config.data} cannot be used; fix them, or "
            "train without them: --on-bad-row skip."
        )
