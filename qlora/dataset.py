"""From a data source to the examples a run trains on and those it holds out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora.errors import InputError
from qlora.files import new_file
from qlora.records import BadRow, read_records
from qlora.tokenize import Example, encode_records, format_sample


def load_examples(
    source: str,
    tokenizer: Any,
    max_length: int,
    train_on: str = "completion",
    on_long: str = "truncate",
    *,
    eval_source: str | None = None,
    eval_split: float = 0.0,
    seed: int = 0,
    say: Callable[[str], Any] = print,
    show_sample: bool = False,
    on_bad_row: str = "stop",
    bad_rows_file: Path | None = None,
    parse_special: bool = False,
    num_workers: int = 0,
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples.

    Args:
        source, eval_source: file or hub id, as `read_records`.
        eval_split: share of `source` to hold out, drawn by `seed`; 0 = none.
        say: receives one line per source, and the sample.
        on_bad_row: a row that cannot be used is raised ("stop"), or left out and counted ("skip").
        bad_rows_file: lists the rows left out, one {"where", "problem"} a line, whether or not enough are left
            to train on; an older one is replaced, or removed where no row is bad.
        parse_special, num_workers: as `encode_records`.
    Raises:
        InputError: unusable data, or a split that leaves one side empty.
    """
    if on_bad_row not in ("stop", "skip"):
        raise InputError(f"on_bad_row is '{on_bad_row}'; use 'stop' or 'skip'.")
    skipped: list[BadRow] = []

    def load(source: str) -> list[Example]:
        bad_rows: list[BadRow] | None = [] if on_bad_row == "skip" else None
        try:
            records = read_records(source, bad_rows=bad_rows)
            options: Any = dict(parse_special=parse_special, num_workers=num_workers, bad_rows=bad_rows)
            examples, report = encode_records(records, tokenizer, max_length, train_on, on_long, **options)
        finally:
            skipped.extend(bad_rows or ())
        listed = f"; bad rows are listed in {bad_rows_file}" if bad_rows and bad_rows_file else ""
        say(f"{source}: {report}{listed}")
        return examples

    try:
        examples = load(source)
        if show_sample:
            say(format_sample(examples[0], tokenizer))
        held_out = load(eval_source) if eval_source is not None else []
    finally:
        if bad_rows_file is not None:
            write_bad_rows(skipped, bad_rows_file)
    if eval_source is not None or eval_split == 0:
        return examples, held_out
    count = max(1, round(eval_split * len(examples)))
    if count >= len(examples):
        raise InputError(f"{source} has {len(examples)} examples, too few to hold any out; pass --eval-data.")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    say(f"held out {count} of them for evaluation")
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def write_bad_rows(bad_rows: Sequence[BadRow], path: Path) -> None:
    """One {"where", "problem"} a line, written whole; without bad rows, no file."""
    if not bad_rows:
        path.unlink(missing_ok=True)
        return
    with new_file(path) as staging, open(staging, "w", encoding="utf-8") as file:
        for row in bad_rows:
            file.write(json.dumps({"where": row.where, "problem": row.problem}) + "\n")
