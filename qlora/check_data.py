"""What is in a data file, and what a run would make of it: check_data gathers, print_check prints.

Without a tokenizer: rows, formats, lengths in characters, rows that cannot be used, rows that look wrong. With
one: tokens, what is truncated, dropped and masked, too. Rows that look wrong are usable, and are trained on.
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

from rich.console import Console
from rich.table import Table

from qlora.records import detect_format, stream_records, to_messages
from qlora.rows import BadRow, collect_bad_row, sort_by_place
from qlora.tokenize import EncodeReport, RowEncoder, format_sample, shift_targets

LONG_TEXT = 100_000  # characters of a row that is worth a look
NUM_LISTED = 20  # bad rows that are printed
NUM_PLACES = 3  # suspicious rows of one kind that are printed
BAR_WIDTH = 40

# Signs of a wrong encoding or of binary data. Tab, newline and carriage return are text.
_STRANGE = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


@dataclass
class DataCheck:
    """What `check_data` found."""

    source: str
    unit: str
    """What `lengths` counts: characters or tokens."""
    lengths: list[int] = field(default_factory=list)
    """Of the rows that can be used, before truncation."""
    formats: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    suspicious: dict[str, list[str]] = field(default_factory=dict)
    """What looks wrong: where."""
    report: EncodeReport | None = None
    """What a run would keep; with a tokenizer only, as is `sample`."""
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
) -> DataCheck:
    """Read a whole file, and tokenise it if there is a tokenizer.

    Arguments as `stream_records` and `encode_records`. The rows themselves are not kept.

    Raises:
        InputError: the file is missing, broken as a whole, or holds no rows.
    """
    check = DataCheck(source, "characters" if tokenizer is None else "tokens")
    encoder = None
    if tokenizer is not None:
        encoder, check.report = RowEncoder(tokenizer, parse_special), EncodeReport()
    first_places: dict[bytes, str] = {}
    for record in stream_records(source, columns=columns):
        if isinstance(record, BadRow):
            check.bad_rows.append(record)
            continue
        origin = record.origin
        try:
            messages = to_messages(record)
            ids, is_target = encoder.encode_row(messages, train_on, origin) if encoder else ([], [])
        except BadRow as error:
            collect_bad_row(error, check.bad_rows)
            continue
        check.formats[detect_format(record.fields, origin)] += 1
        num_characters = sum(len(message["content"]) for message in messages)
        check.lengths.append(num_characters)
        signs = _find_signs(messages, num_characters, encoder)
        digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=16).digest()
        if first_places.setdefault(digest, origin) != origin:
            check.suspicious.setdefault("same as an earlier row", []).append(f"{origin} is {first_places[digest]}")
        if encoder and check.report:
            row = shift_targets(ids, is_target, len(ids), origin)
            check.lengths[-1] = len(row)
            had_targets, num_dropped = row.num_targets > 0, check.report.num_dropped_no_target
            example = check.report.admit(row, max_length, on_long)
            if example and check.sample is None:
                check.sample = format_sample(example, tokenizer)
            if had_targets and check.report.num_dropped_no_target > num_dropped:
                signs.append(f"dropped, for all targets lie beyond --max-length {max_length}")
        for sign in signs:
            check.suspicious.setdefault(sign, []).append(origin)
    sort_by_place(check.bad_rows)
    if check.report:
        check.report.num_bad_rows = len(check.bad_rows)
        check.report.num_records = check.num_rows
    return check


def _find_signs(messages: list[dict[str, Any]], num_characters: int, encoder: RowEncoder | None) -> list[str]:
    """What looks wrong in one row, from its texts alone."""
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
        signs.append("control characters, or U+FFFD for a lost one")
    if num_characters > LONG_TEXT:
        signs.append(f"longer than {LONG_TEXT:,} characters")
    return signs


def length_histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(from, to, number of rows), each range twice as long as the one before, empty ones at the ends left out."""
    buckets = Counter(length.bit_length() for length in lengths)  # 0, 1, 2 to 3, 4 to 7, ...
    shown = range(min(buckets, default=0), max(buckets, default=-1) + 1)
    return [(2**bits // 2, 2**bits - 1, buckets[bits]) for bits in shown]


def print_check(check: DataCheck, console: Console | None = None) -> None:
    """The summary, for a person."""
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    formats = ", ".join(f"{count:,} {name}" for name, count in check.formats.most_common())
    console.print(f"{check.source}: {check.num_rows:,} rows" + (f" ({formats})" if formats else ""))
    if check.lengths:
        longest, mean = max(check.lengths), sum(check.lengths) / len(check.lengths)
        console.print(f"{sum(check.lengths):,} {check.unit}, {mean:,.0f} a row, {longest:,} in the longest")
        _print_histogram(check, console)
    if check.report:
        masked = check.report.num_tokens - check.report.num_targets
        console.print(f"{check.report}; the other {masked:,} are masked: read, and not learnt")
    if check.sample:
        console.print(f"\nthe first row as the model sees it, {check.sample}\n")
    if check.bad_rows:
        console.print(f"{len(check.bad_rows):,} rows cannot be used:")
    for row in check.bad_rows[:NUM_LISTED]:
        console.print(f"  {row}")
    if len(check.bad_rows) > NUM_LISTED:
        console.print(f"  and {len(check.bad_rows) - NUM_LISTED:,} more")
    if check.suspicious:
        console.print("rows that can be used, but are worth a look:")
    for sign, places in sorted(check.suspicious.items(), key=lambda item: -len(item[1])):
        more = f" and {len(places) - NUM_PLACES:,} more" if len(places) > NUM_PLACES else ""
        console.print(f"  {len(places):>6,}  {sign}: {', '.join(places[:NUM_PLACES])}{more}")


def _print_histogram(check: DataCheck, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in (check.unit, "rows"):
        table.add_column(name, justify="right")
    table.add_column("")
    buckets = length_histogram(check.lengths)
    most = max(count for _, _, count in buckets)
    for low, high, count in buckets:
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        table.add_row(span, f"{count:,}", "#" * -(-BAR_WIDTH * count // most))
    console.print(table)
