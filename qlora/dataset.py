"""From a data source to the examples a run trains on and those it holds out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora.errors import InputError
from qlora.records import read_records
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
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples.

    Args:
        source, eval_source: file or hub id, as `read_records`.
        eval_split: share of `source` to hold out, drawn by `seed`; 0 = none.
        say: receives one line per source, and the sample.
    Raises:
        InputError: unusable data, or a split that leaves one side empty.
    """
    examples, report = encode_records(read_records(source), tokenizer, max_length, train_on, on_long)
    say(f"{source}: {report}")
    if show_sample:
        say(format_sample(examples[0], tokenizer))
    if eval_source is not None:
        held_out, report = encode_records(read_records(eval_source), tokenizer, max_length, train_on, on_long)
        say(f"{eval_source}: {report}")
        return examples, held_out
    if eval_split == 0:
        return examples, []
    count = max(1, round(eval_split * len(examples)))
    if count >= len(examples):
        raise InputError(f"{source} has {len(examples)} examples, too few to hold any out; pass --eval-data.")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    say(f"held out {count} of them for evaluation")
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]
