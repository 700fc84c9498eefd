"""Rows of data, errors about them, and reading of untrusted JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora.system.errors import InputError
from qlora.system.wording import describe, quote, shorten


@dataclass(frozen=True)
class Record:
    """One row as found in its source, where (such as `train.jsonl:17`), and what its reader notes of columns."""

    fields: dict[str, Any]
    origin: str
    notes: tuple[tuple[str, str], ...] = ()


class BadRow(InputError):
    """An unusable row: where it is, and the problem and its remedy in one sentence."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def collect_bad_row(error: BadRow, bad_rows: list[BadRow] | None) -> None:
    """Append the error to the list, or raise it if there is no list."""
    if bad_rows is None:
        raise error
    bad_rows.append(BadRow(error.where, error.problem))  # a copy: the traceback would keep the row in memory


def sort_by_place(bad_rows: list[BadRow]) -> None:
    """Sort the bad rows of one source, found during and after reading, in the source's order."""
    bad_rows.sort(key=lambda row: [int(number) for number in re.findall(r"\d+(?=\]?$)", row.where)])


class _DoubledKey(dict[str, Any]):
    """A JSON object in which `key` occurs more than once."""

    key: Any


def find_doubled(names: list[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def load_json(text: str) -> tuple[Any, bool]:
    """A JSON value, and whether it needs `find_flaw`: it has NaN, an infinity or a duplicate key.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    flaws: list[str] = []

    def read_constant(name: str) -> float:
        flaws.append(name)
        return float(name)

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            fields = _DoubledKey(fields)
            fields.key = find_doubled([key for key, _ in pairs])
            flaws.append("a key given twice")
        return fields

    try:
        value = json.JSONDecoder(object_pairs_hook=build, parse_constant=read_constant).decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value, bool(flaws)


def find_flaw(record: Any) -> str | None:
    """The flaw that `load_json` let through in this record, as a problem with its remedy."""
    stack = [("the row", record)]  # no recursion: JSON may be nested as deeply as Python's stack
    while stack:
        name, value = stack.pop()
        if isinstance(value, _DoubledKey):
            last = quote(value[value.key])
            return f"{name} has the key {quote(value.key)} twice, the last one as {last}; keep one of them"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {json.dumps(value)}, which is not a JSON value; write null or a number"
        if isinstance(value, dict):
            stack += [(quote(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [(name, item) for item in value]
    return None


def as_row(value: Any, origin: str, may_have_flaw: bool) -> Record | BadRow:
    """A value that stands where a row should; `may_have_flaw`: look for what `find_flaw` names."""
    if not isinstance(value, dict):
        return BadRow(origin, f'the row is {describe(value)}; write an object such as {{"text": "..."}}.')
    flaw = find_flaw(value) if may_have_flaw else None
    return BadRow(origin, f"{flaw}.") if flaw else Record(value, origin)


def without_nulls(value: Any) -> Any:
    """A value of Arrow without keys that hold null: Arrow gives every struct of a column the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return [without_nulls(item) for item in value]
    return value


def arrow_record(fields: dict[str, Any], origin: str, notes: tuple[tuple[str, str], ...] = ()) -> Record:
    """A row of Arrow, as a file of JSON would give it; its columns stay, since a null one is named in errors."""
    read = {name: without_nulls(value) for name, value in fields.items()}
    whole = tuple((WHOLE, name) for name, value in read.items() if _has_whole_float({name: value}, False))
    return Record(read, origin, notes + whole)


WHOLE = "whole numbers of calls and tools that Arrow holds as fractions (1 as 1.0)"
# Keys whose values are JSON, as an object or as text.
JSON_KEYS = ("tools", "tool_calls", "function_call", "arguments", "parameters", "args", "input", "properties")


def _has_whole_float(value: Any, is_json: bool) -> bool:
    """Whether calls or tools in a value hold a float such as 1.0; a text column of their name does not count."""
    if isinstance(value, dict):
        return any(_has_whole_float(item, is_json or key in JSON_KEYS) for key, item in value.items())
    if isinstance(value, list):
        return any(_has_whole_float(item, is_json) for item in value)
    return is_json and isinstance(value, float) and value.is_integer()


MIXED = "columns of mixed kinds, whose texts the library datasets reads as JSON (quotes and numbers may be lost)"


def find_mixed(features: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Notes on a dataset's columns in which a text has the feature Json.

    `datasets` gives it to values of several kinds, and then reads a text that is JSON as what it says: '"a"' as a.
    """
    found = set[str]()

    def search(column: str, feature: Any, is_text: bool, is_turns: bool) -> None:
        if type(feature).__name__ == "Json" and is_text:
            found.add(column)
        elif isinstance(feature, Mapping):
            for key, item in feature.items():
                search(column, item, key not in JSON_KEYS, False)
        elif hasattr(feature, "feature") or isinstance(feature, list):
            inner = feature[0] if isinstance(feature, list) else feature.feature
            search(column, inner, is_text and not is_turns, False)

    for column, feature in features.items():
        search(column, feature, column != "tools", True)
    return tuple((MIXED, column) for column in sorted(found))


def explain_json(error: ValueError, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({shorten(' '.join(str(error).split()), 80)})"
    near = quote(text[max(0, error.pos - 10) : error.pos + 20])
    return f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno}, near {near})"
