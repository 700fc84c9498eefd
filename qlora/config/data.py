"""Settings of the training data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qlora.config.fields import join_fields, split_names
from qlora.system.errors import InputError


@dataclass
class RowsConfig:
    """How a record becomes a row of tokens."""

    data: str | None = None
    """Training data: a .jsonl, .json, .csv or .parquet file, or a hub id; several, or a pattern, by commas."""
    columns: str = ""
    """Columns that go by another name, as prompt=question,completion=answer."""
    chat_template: str | None = None
    """File of a Jinja chat template to use in the place of the tokenizer's; it is saved with the adapter."""
    max_length: int = 1024
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = "truncate"
    """A longer example keeps its first --max-length tokens, or is dropped."""
    train_on: Literal["completion", "all"] = "completion"
    """Learn the assistant's turns only, or every token."""
    parse_special: bool = False
    """Let text that spells a special token inside a message be that token instead of plain text."""

    def __post_init__(self) -> None:
        join_fields(self)
        _ = self.column_names  # raises if it does not read
        if self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; give --max-length 2 or more.")

    @property
    def column_names(self) -> dict[str, str]:
        """The name that is read -> the data's own; a comma or = may stand in the latter."""
        names: dict[str, str] = {}
        for entry in re.split(r",(?=\s*\w+\s*=)", self.columns) if self.columns.strip() else []:
            key, _, column = (part.strip() for part in entry.partition("="))
            if not key or not column or key in names:
                raise InputError(f"columns holds {entry!r:.80}; give --columns name=column,... each name once.")
            names[key] = column
        return names


@dataclass
class DataConfig(RowsConfig):
    """What is trained on."""

    data_weights: str = ""
    """How often an epoch sees each of these, as 1,0.3,...: 0.3 = a new sample of 30 % each time, 2 = twice."""
    eval_data: str | None = None
    """Held-out data for --eval-every."""
    eval_split: float = 0.0
    """Share of --data (of each source) to hold out instead, drawn by --seed; with or without --eval-every, so both
    train alike."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used ends the run, or is left out, counted and listed in bad_rows.jsonl."""
    num_workers: int = 0
    """Processes that tokenise; 0 = this one."""
    token_cache: bool = True
    """Keep the tokens on disk ($QLORA_CACHE/tokens) for the next start and map them; else they stay in memory."""
    packing: bool = True
    """Lay examples end to end with block-diagonal attention; --no-packing pads rows instead."""
    show_sample: bool = False
    """Print one example as the model sees it, with what is masked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.weights  # raises if they do not read
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}; give --num-workers 0 or more.")
        if not 0 <= self.eval_split < 1:
            raise InputError(f"eval_split is {self.eval_split}; give --eval-split a share from 0 to below 1.")
        if self.eval_split > 0 and self.eval_data is not None:
            raise InputError("Both eval_data and eval_split are given; pass one of them.")

    @property
    def weights(self) -> list[float]:
        """--data-weights as numbers."""
        try:
            return [float(part) for part in split_names(self.data_weights)]
        except ValueError as error:
            raise InputError(
                f"data_weights is {self.data_weights!r:.80}; give --data-weights numbers separated by commas."
            ) from error
