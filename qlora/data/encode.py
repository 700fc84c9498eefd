"""Tokenize records into a stream of examples, in one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora.data.conversations import to_messages
from qlora.data.example import EncodeReport, Example, finish_report, shift_targets
from qlora.data.keys import count_notes
from qlora.data.row_encoder import Row, RowEncoder
from qlora.data.rows import BadRow, Record, collect_bad_row
from qlora.system.errors import InputError
from qlora.system.processes import map_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_SIZE = 128  # records per task of a worker process


def encode_prompt(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, parse_special: bool = False
) -> list[int]:
    """Ids of a conversation up to the start of the assistant's turn, exactly as in a training row.

    A document gives BOS (if the tokenizer adds it) and its text.
    """
    return RowEncoder(tokenizer, parse_special).encode_prompt(messages)


def encode_records(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on: str = "completion",
    on_long: str = "truncate",
    *,
    parse_special: bool = False,
    num_workers: int = 0,
    bad_rows: list[BadRow] | None = None,
) -> tuple[list[Example], EncodeReport]:
    """Encode every record as a row. Rows without a target teach nothing: they are dropped and counted.

    Args:
        on_long:       "truncate" keeps a longer row's first max_length tokens, "drop" leaves it out.
        parse_special: special-token text in a message becomes the token.
        num_workers:   worker processes that tokenize; 0 = this process. The result and its order are the same.
        bad_rows:      collects unusable records, merged in file order with those from read_records; all are
            counted. None: raise at the first.
    Raises:
        BadRow: a record is unusable and bad_rows is None.
        InputError: nothing is left to train on.
        TrainingStopped: a worker died.
    """
    examples, report = [], EncodeReport()
    options: Any = dict(parse_special=parse_special, num_workers=num_workers)
    rows = stream_examples(records, tokenizer, max_length, train_on, on_long, report, **options)
    with closing(rows):
        for row in rows:
            if isinstance(row, BadRow):
                collect_bad_row(row, bad_rows)
            else:
                examples.append(row)
    finish_report(report, bad_rows or [], len(examples), max_length)
    return examples, report


def stream_examples(
    records: Iterable[Record | BadRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on: str,
    on_long: str,
    report: EncodeReport,
    *,
    parse_special: bool = False,
    num_workers: int = 0,
) -> Generator[Example | BadRow, None, None]:
    """Yield training rows and bad rows; `report` counts the dropped ones. Call `finish_report` at the end.

    Arguments and errors are those of `encode_records`. Close the generator to end its workers early.
    """
    _check_options(max_length, train_on, on_long)
    encode = partial(_encode_chunk, RowEncoder(tokenizer, parse_special), train_on, max_length)
    rows = iter(records)
    chunks = iter(lambda: list(islice(rows, CHUNK_SIZE)), [])
    with closing(map_chunks(encode, chunks, num_workers)) as results:  # an error here ends the workers
        for result in chain.from_iterable(results):
            if isinstance(result, BadRow):
                yield result
                continue
            ids, targets, origin, notes = result
            count_notes(report.notes, notes)
            row = Example(torch.from_numpy(ids), torch.from_numpy(targets), origin)
            example = report.admit(row, max_length, on_long)
            if example is not None:
                yield example


_Notes = set[tuple[str, str]]
_Result = tuple[np.ndarray, np.ndarray, str, _Notes] | BadRow  # as an Example; a tensor would be sent as a file


def _encode_chunk(
    encoder: RowEncoder, train_on: str, max_length: int, records: list[Record | BadRow]
) -> list[_Result]:
    """Rows of at most max_length + 1 tokens: the extra one marks a row as too long."""
    results: list[_Result | None] = []
    good: list[tuple[list[dict[str, Any]], str, _Notes]] = []
    for record in records:
        notes: _Notes = set()
        try:
            if isinstance(record, BadRow):
                raise record
            good.append((to_messages(record, _note_into(notes)), record.origin, notes))
            results.append(None)
        except BadRow as error:
            results.append(BadRow(error.where, error.problem))
    encoded = encoder.encode_rows(
        ((messages, origin, _note_into(notes)) for messages, origin, notes in good), train_on, max_length + 2
    )
    rows = zip(good, encoded, strict=True)
    return [_result(*next(rows), max_length) if result is None else result for result in results]


def _result(task: tuple[Any, str, _Notes], row: Row | BadRow, max_length: int) -> _Result:
    if isinstance(row, BadRow):
        return BadRow(row.where, row.problem)
    _, origin, notes = task
    example = shift_targets(*row, max_length + 1, origin)
    return example.input_ids.numpy(), example.targets.numpy(), origin, notes


def _note_into(notes: _Notes) -> Callable[[str, str], None]:
    return lambda *note: notes.add(note)


def _check_options(max_length: int, train_on: str, on_long: str) -> None:
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; give at least 1.")
    if train_on not in ("completion", "last", "all"):
        raise InputError(f"train_on is '{train_on}'; use 'completion', 'last' or 'all'.")
    if on_long not in ("truncate", "drop"):
        raise InputError(f"on_long is '{on_long}'; use 'truncate' or 'drop'.")
