"""Settings of the training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from qlora.config.settings import Columns, Count, Numbers, Settings, Sources, at_least, between
from qlora.system.errors import InputError


@dataclass
class RowsConfig(Settings):
    """How records become rows of tokens."""

    data: Sources = field(default_factory=list)
    """Training data: a .jsonl, .json, .csv or .parquet file, or a hub id; several, or a pattern, by commas."""
    columns: Columns = field(default_factory=dict)
    """Columns that go by another name, as prompt=question,completion=answer."""
    chat_template: str | None = None
    """File of a Jinja chat template to use in the place of the tokenizer's; it is saved with the adapter."""
    max_length: Annotated[int, at_least(2)] = 1024
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = "truncate"
    """A longer example keeps its first --max-length tokens, or is dropped."""
    train_on: Literal["completion", "last", "all"] = "completion"
    """Learn all of the assistant's turns, the last of them only, or every token."""
    parse_special: bool = False
    """Let text that spells a special token inside a message be that token instead of plain text."""


@dataclass
class DataConfig(RowsConfig):
    """Training data."""

    data_weights: Numbers = field(default_factory=list)
    """How often an epoch sees each of these, as 1,0.3,...: 0.3 = a new sample of 30 % each time, 2 = twice."""
    eval_data: str | None = None
    """Held-out data for --eval-every."""
    eval_split: Annotated[float, between(0, 1, "a share from 0 to below 1")] = 0.0
    """Share of --data (of each source) to hold out instead, drawn by --seed; held out even without
    --eval-every, so that the training rows stay the same."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used ends the run, or is left out, counted and listed in bad_rows.jsonl."""
    num_workers: Count = 0
    """Processes that tokenize; 0 = this one."""
    token_cache: bool = True
    """Keep the tokens on disk ($QLORA_CACHE/tokens) for the next start and map them; else they stay in memory."""
    packing: bool = True
    """Lay examples end to end with block-diagonal attention; --no-packing pads rows instead."""
    show_sample: bool = False
    """Print one example as the model sees it, with what is masked: context only, no loss."""

    def check(self) -> None:
        if self.eval_split > 0 and self.eval_data is not None:
            raise InputError("Both eval_data and eval_split are given; pass one of them.")
