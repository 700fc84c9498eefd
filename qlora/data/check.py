"""What is in a data file and how a run would use it: `check_data` collects, `print_check` prints.

Without a tokenizer: rows, formats, lengths in characters, unusable rows and suspicious rows. With a tokenizer
also tokens, and what is truncated, dropped and masked. Suspicious rows are usable and are trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qlora.data.example import EncodeReport, format_sample, shift_targets
from qlora.data.keys import Notes, count_notes
from qlora.data.preferences import Kind, read_row
from qlora.data.readers import detect_format, stream_records
from qlora.data.row_encoder import RowEncoder
from qlora.data.rows import BadRow, collect_bad_row, sort_by_place

LONG_TEXT = 100_000  # characters; a longer row is suspicious
# Signs of a wrong encoding or binary data. Tab, newline and carriage return are text.
_STRANGE = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


@dataclass
class DataCheck:
    """What `check_data` found."""

    source: str
    unit: str
    """The unit of `lengths`: characters or tokens."""
    lengths: list[int] = field(default_factory=list)
    """Lengths of the usable rows, before truncation."""
    formats: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    suspicious: dict[str, list[str]] = field(default_factory=dict)
    """Problem -> the rows that show it."""
    notes: Notes = field(default_factory=dict)
    """What is not used, and in how many rows."""
    report: EncodeReport | None = None
    """What a run would keep; like `sample`, set only with a tokenizer."""
    sample: str | None = None

    @property
    def num_rows(self) -> int:
        return len(self.lengths) + len(self.bad_rows)


def check_data(
    source: str,
    tokenizer: Any = None,
    max_length: int = 1024,
    train_on: str = "completion",
    on_long: str = "truncate",
    parse_special: bool = False,
    columns: Mapping[str, str] | None = None,
    kind: Kind = "answers",
) -> DataCheck:
    """Read a whole file, and tokenize it if there is a tokenizer; the rows themselves are not kept.

    The arguments are those of `stream_records` and `encode_records`.

    Raises:
        InputError: the file is missing, broken as a whole, or holds no rows.
    """
    check = DataCheck(source, "characters" if tokenizer is None else "tokens")
    encoder = None
    if tokenizer is not None:
        encoder, check.report = RowEncoder(tokenizer, parse_special), EncodeReport(notes=check.notes)
    first_places: dict[bytes, str] = {}
    for record in stream_records(source, columns=columns, kind=kind):
        if isinstance(record, BadRow):
            check.bad_rows.append(record)
            continue
        origin, notes = record.origin, set[tuple[str, str]]()

        def note(what: str, name: str, notes: set[tuple[str, str]] = notes) -> None:
            notes.add((what, name))

        try:
            conversations, is_wanted = read_row(record, kind, note)
            encoded = [encoder.encode_row(each, train_on, origin, note) for each in conversations if encoder]
        except BadRow as error:
            collect_bad_row(error, check.bad_rows)
            continue
        count_notes(check.notes, notes)
        check.formats[detect_format(record.fields, origin, kind)] += 1
        messages = [message for conversation in conversations for message in conversation]
        num_characters = sum(len(message["content"]) for message in messages)
        check.lengths.append(num_characters)
        signs = _find_signs(messages, num_characters, encoder)
        digest = hashlib.blake2b(json.dumps([messages, is_wanted]).encode(), digest_size=16).digest()
        if first_places.setdefault(digest, origin) != origin:
            check.suspicious.setdefault("same as an earlier row", []).append(f"{origin} is {first_places[digest]}")
        if check.report:
            rows = [shift_targets(ids, is_target, len(ids), origin) for ids, is_target in encoded]
            check.lengths[-1] = sum(map(len, rows))
            had_targets, num_dropped = all(row.num_targets for row in rows), check.report.num_dropped_no_target
            kept = check.report.admit_sequences(rows, max_length, on_long)
            if kept and check.sample is None:
                check.sample = "\n".join(format_sample(row, tokenizer) for row in kept)
            if had_targets and check.report.num_dropped_no_target > num_dropped:
                signs.append(f"dropped: all targets lie beyond --max-length {max_length}")
        for sign in signs:
            check.suspicious.setdefault(sign, []).append(origin)
    sort_by_place(check.bad_rows)
    if check.report:
        check.report.num_bad_rows = len(check.bad_rows)
        check.report.num_records = check.num_rows
    return check


def _find_signs(messages: list[dict[str, Any]], num_characters: int, encoder: RowEncoder | None) -> list[str]:
    """What looks wrong in the text of one row."""
    signs = []
    turns = pairwise(messages)
    answers = [
        (asked["content"], turn["content"])
        for asked, turn in turns
        if turn["role"] == "assistant" and "tool_calls" not in turn
    ]
    if any(not any(character.isalnum() for character in answer) for _, answer in answers):
        signs.append("an answer without a letter or digit")
    if any(asked.strip() == answer.strip() != "" for asked, answer in answers):
        signs.append("an answer that repeats the question")
    contents = [message["content"] for message in messages]
    if encoder and messages[0]["role"] != "document" and any(map(encoder.special.search, contents)):
        signs.append("special-token text in a message" + (", a control token" if encoder.parse_special else ""))
    if any(map(_STRANGE.search, contents)):
        signs.append("control characters, or U+FFFD in place of a lost character")
    if num_characters > LONG_TEXT:
        signs.append(f"longer than {LONG_TEXT:,} characters")
    return signs


def length_histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(from, to, number of rows); each range is twice as long as the last, without empty ones at the ends."""
    buckets = Counter(length.bit_length() for length in lengths)  # 0, 1, 2 to 3, 4 to 7, ...
    shown = range(min(buckets, default=0), max(buckets, default=-1) + 1)
    return [(2**bits // 2, 2**bits - 1, buckets[bits]) for bits in shown]
