"""Tokenize records into a stream of examples, in one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

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
    encode = partial(_encode_chunk, RowEncoder(tokenizer, parse_special), train_on, max_length)
    tasks = map(partial(_read_task, kind), records)
    chunks = iter(lambda: list(islice(tasks, CHUNK_SIZE)), [])

    def admit_all(results: Iterable[_Result]) -> Generator[Example | BadRow, None, None]:
        for result in results:
            if isinstance(result, BadRow):
                yield result
                continue
            sequences, is_wanted, origin, notes = result
            count_notes(report.notes, notes)
            rows = [shift_targets(*sequence, max_length + 1, origin) for sequence in sequences]
            kept = report.admit_sequences(rows, max_length, on_long)
            if len(kept) == 2:
                yield join_pair(kept[0], kept[1])
            elif kept:
                yield kept[0] if is_wanted else replace(kept[0], is_wanted=False)

    with closing(map_chunks(encode, chunks, num_workers)) as results:  # an error here ends the workers
        admitted = admit_all(chain.from_iterable(results))
        yield from with_other_answers(admitted, max_length) if kind == "labels" else admitted


_Notes = set[tuple[str, str]]
_Task = tuple[list[Messages], bool, str, _Notes] | BadRow  # conversations, whether wanted, origin, what was noted
_Result = tuple[list[Row], bool, str, _Notes] | BadRow  # t_0 .. t_T and whether each is predicted, ...


def _read_task(kind: Kind, record: Record | BadRow) -> _Task:
    if isinstance(record, BadRow):
        return record
    try:
        notes: _Notes = set()
        return *read_row(record, kind, lambda *note: notes.add(note)), record.origin, notes
    except BadRow as error:
        return error


def _encode_chunk(encoder: RowEncoder, train_on: str, max_length: int, tasks: list[_Task]) -> list[_Result]:
    """Rows cut to max_length + 1 tokens to read: the extra one marks a row as too long."""
    good = [task for task in tasks if not isinstance(task, BadRow)]
    asked = (
        (messages, origin, _note_into(notes))
        for conversations, _, origin, notes in good
        for messages in conversations
    )
    rows = iter(encoder.encode_rows(asked, train_on))
    results: list[_Result] = []
    for task in tasks:
        if isinstance(task, BadRow):
            results.append(task)
            continue
        conversations, is_wanted, origin, notes = task
        found = list(islice(rows, len(conversations)))
        bad = next((row for row in found if isinstance(row, BadRow)), None)
        if bad is not None:
            results.append(BadRow(bad.where, bad.problem))
            continue
        cut = [tuple(part[: max_length + 2] for part in row) for row in found if not isinstance(row, BadRow)]
        results.append((cut, is_wanted, origin, notes))  # type: ignore[arg-type]
    return results


def _note_into(notes: _Notes) -> Callable[[str, str], None]:
    return lambda *note: notes.add(note)


def _check_options(max_length: int, train_on: str, on_long: str) -> None:
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; give at least 1.")
    if train_on not in ("completion", "last", "all"):
        raise InputError(f"train_on is '{train_on}'; use 'completion', 'last' or 'all'.")
    if on_long not in ("truncate", "drop"):
        raise InputError(f"on_long is '{on_long}'; use 'truncate' or 'drop'.")
