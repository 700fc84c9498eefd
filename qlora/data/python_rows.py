"""Rows from Python, where a file could stand: dicts in a list, a pandas DataFrame, a datasets.Dataset."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Mapping
from decimal import Decimal
from typing import Any

from qlora.data.rows import BadRow, Record, arrow_record, as_row, find_doubled, find_mixed
from qlora.system.errors import InputError
from qlora.system.wording import describe, quote

KINDS = "a path, a list of dicts, a pandas DataFrame or a datasets.Dataset"
# Their repr is their whole value, so that a digest may take it. (An array's, for one, leaves out its middle.)
WRITTEN_OUT = (datetime.date, datetime.time, datetime.timedelta, Decimal, bytes)


class PythonRows:
    """A source of rows in memory; its places read as in Python, `data[3]`.

    Args:
        name: what the user calls it, such as data or data[0].
        rows: dicts in a list or tuple, a pandas DataFrame (an empty cell is null) or a datasets.Dataset.
    Raises:
        InputError: rows of another kind, or a DataFrame that has a column twice.
    """

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self.rows = name, rows
        self.is_dataset, self.is_frame = _is_a("datasets", "Dataset", rows), _is_a("pandas", "DataFrame", rows)
        if isinstance(rows, Mapping):
            keys = ", ".join(map(quote, list(rows)[:5]))
            raise InputError(f"{name} is of type {type(rows).__name__}, with {keys}; give one split or [row].")
        if not (self.is_dataset or self.is_frame or isinstance(rows, (list, tuple))):
            raise InputError(f"{name} is of type {type(rows).__name__}; give {KINDS}.")
        if self.is_frame and (doubled := find_doubled([str(column) for column in rows.columns])) is not None:
            raise InputError(f"{name}: the column {quote(doubled)} occurs twice; rename one.")
        if self.is_dataset and rows.format["type"] not in (None, "custom"):  # tensors: back to Python's values
            self.rows = rows.with_format(None, columns=rows.format["columns"])

    def __str__(self) -> str:
        return self.name

    def stream(self) -> Generator[Record | BadRow, None, None]:
        """The rows, one after another."""
        notes = find_mixed(self.rows.features or {}) if self.is_dataset else ()
        for number, row in enumerate(self._dicts()):
            origin = f"{self.name}[{number}]"
            try:
                if self.is_dataset:
                    yield arrow_record(row, origin, notes)
                else:
                    found = as_row(plain(row), origin, may_have_flaw=True)
                    if self.is_frame and isinstance(found, Record):  # pandas reads tables with Arrow
                        found = arrow_record(found.fields, origin)
                    yield found
            except (TypeError, RecursionError) as error:
                problem = "the row is nested too deeply" if isinstance(error, RecursionError) else error
                yield BadRow(origin, f"{problem}.")

    def _dicts(self) -> Iterable[Any]:
        if not self.is_frame:
            return self.rows
        from pandas import isna
        from pandas.api.types import is_scalar

        columns = [self.rows.iloc[:, place] for place in range(self.rows.shape[1])]
        names = list(self.rows.columns)
        return (
            {n: None if is_scalar(cell) and isna(cell) else cell for n, cell in zip(names, cells, strict=True)}
            for cells in zip(*columns, strict=True)
        )

    def identity(self) -> list[Any] | None:
        """What changes when the rows do; None where a value has no digest, so that nothing can be cached."""
        if self.is_dataset:
            return [self.name, str(self.rows._fingerprint)]
        digest = hashlib.sha256()
        try:
            for row in self._dicts():
                digest.update(json.dumps(plain(row), default=_write_out).encode() + b"\n")
        except (TypeError, ValueError, RecursionError):
            return None
        return [self.name, digest.hexdigest()]


def plain(value: Any) -> Any:
    """The value as a file of JSON would give it: arrays and tuples as lists, NumPy's numbers as Python's.

    Raises:
        TypeError: a key is not text; the message is the problem and its remedy.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {describe(key)} is not text; name every column by a text")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        value = value.tolist()
        return plain(value) if isinstance(value, list) else value
    return value


def _write_out(value: Any) -> list[str]:
    if not isinstance(value, WRITTEN_OUT):
        raise TypeError
    return [type(value).__name__, repr(value)]


def _is_a(package: str, name: str, value: Any) -> bool:
    """Whether the value is of this class; a package that is not imported has made no value."""
    found = getattr(sys.modules.get(package), name, None)
    return found is not None and isinstance(value, found)


def take_sources(name: str, value: Any) -> list[str | PythonRows]:
    """What Python gives as data: a source, or a list of sources.

    A text is one as on the command line, commas and patterns included.

    Args:
        name: the setting, which names the rows.
    Raises:
        InputError: it is of another kind.
    """
    if isinstance(value, (str, os.PathLike)):
        return [os.fspath(value)]
    if isinstance(value, (list, tuple)) and value and _is_source(value[0]):
        return [
            os.fspath(item) if isinstance(item, (str, os.PathLike)) else PythonRows(f"{name}[{place}]", item)
            for place, item in enumerate(value)
        ]
    return [PythonRows(name, value)]


def _is_source(value: Any) -> bool:
    is_table = _is_a("pandas", "DataFrame", value) or _is_a("datasets", "Dataset", value)
    return is_table or isinstance(value, (str, os.PathLike, list, tuple))
