"""Tokenize records into a stream of examples, in one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora.data.example import EncodeReport, Example, finish_report, shift_targets
from qlora.data.keys import count_notes
from qlora.data.preferences import Kind, Messages, join_pair, read_row, with_other_answers
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
    kind: Kind = "answers",
    bad_rows: list[BadRow] | None = None,
) -> tuple[list[Example], EncodeReport]:
    """Encode every record as a row. Rows without a target teach nothing: they are dropped and counted.

    Args:
        on_long:       "truncate" keeps a longer row's first max_length tokens, "drop" leaves it out.
        parse_special: special-token text in a message becomes the token.
        num_workers:   worker processes that tokenize; 0 = this process. The result and its order are the same.
        kind:          what a record holds; pairs and labelled answers become rows of two sequences.
        bad_rows:      collects unusable records, merged in file order with those from read_records; all are
            counted. None: raise at the first.
    Raises:
        BadRow: a record is unusable and bad_rows is None.
        InputError: nothing is left to train on.
        TrainingStopped: a worker died.
    """
    examples, report = [], EncodeReport()
    options: Any = dict(parse_special=parse_special, num_workers=num_workers, kind=kind)
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
    kind: Kind = "answers",
) -> Generator[Example | BadRow, None, None]:
    """Yield training rows and bad rows; `report` counts the dropped ones. Call `finish_report` at the end.

    Arguments and errors are those of `encode_records`. Close the generator to end its workers early.
    """
    _check_options(max_length, train_on, on_long)
    encode = partial(_encode_chunk, RowEncoder(tokenizer, parse_special), train_on, max_length, kind)
    rows = iter(records)
    chunks = iter(lambda: list(islice(rows, CHUNK_SIZE)), [])

    def admit_all(results: Iterable[_Result]) -> Generator[Example | BadRow, None, None]:
        for result in results:
            if isinstance(result, BadRow):
                yield result
                continue
            sequences, is_wanted, origin, notes = result
            count_notes(report.notes, notes)
            examples = [Example(torch.from_numpy(ids), torch.from_numpy(t), origin) for ids, t in sequences]
            kept = report.admit_sequences(examples, max_length, on_long)
            if len(kept) == 2:
                yield join_pair(kept[0], kept[1])
            elif kept:
                yield kept[0] if is_wanted else replace(kept[0], is_wanted=False)

    with closing(map_chunks(encode, chunks, num_workers)) as results:  # an error here ends the workers
        admitted = admit_all(chain.from_iterable(results))
        yield from with_other_answers(admitted, max_length) if kind == "labels" else admitted


_Notes = set[tuple[str, str]]
_Task = tuple[list[Messages], bool, str, _Notes]  # conversations, whether wanted, origin, what was noted
_Sequence = tuple[np.ndarray, np.ndarray]  # as an Example; a tensor would be sent as a file
_Result = tuple[list[_Sequence], bool, str, _Notes] | BadRow


def _encode_chunk(
    encoder: RowEncoder, train_on: str, max_length: int, kind: Kind, records: list[Record | BadRow]
) -> list[_Result]:
    """Rows whose sequences have at most max_length + 1 tokens: the extra one marks a row as too long."""
    results: list[_Result | None] = []
    good: list[_Task] = []
    for record in records:
        notes: _Notes = set()
        try:
            if isinstance(record, BadRow):
                raise record
            good.append((*read_row(record, kind, _note_into(notes)), record.origin, notes))
            results.append(None)
        except BadRow as error:
            results.append(BadRow(error.where, error.problem))
    asked = (
        (messages, origin, _note_into(notes))
        for conversations, _, origin, notes in good
        for messages in conversations
    )
    encoded, tasks = iter(encoder.encode_rows(asked, train_on, max_length + 2)), iter(good)
    return [_result(next(tasks), encoded, max_length) if result is None else result for result in results]


def _result(task: _Task, encoded: Iterator[Row | BadRow], max_length: int) -> _Result:
    conversations, is_wanted, origin, notes = task
    sequences: list[_Sequence] = []
    bad: BadRow | None = None
    for row in islice(encoded, len(conversations)):
        if isinstance(row, BadRow):
            bad = bad or BadRow(row.where, row.problem)
            continue
        example = shift_targets(*row, max_length + 1, origin)
        sequences.append((example.input_ids.numpy(), example.targets.numpy()))
    return bad or (sequences, is_wanted, origin, notes)


def _note_into(notes: _Notes) -> Callable[[str, str], None]:
    return lambda *note: notes.add(note)


def _check_options(max_length: int, train_on: str, on_long: str) -> None:
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; give at least 1.")
    if train_on not in ("completion", "last", "all"):
        raise InputError(f"train_on is '{train_on}'; use 'completion', 'last' or 'all'.")
    if on_long not in ("truncate", "drop"):
        raise InputError(f"on_long is '{on_long}'; use 'truncate' or 'drop'.")
