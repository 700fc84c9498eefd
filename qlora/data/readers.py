"""Read rows from files, from the hub and from Python, one at a time: .jsonl, .json, .csv, .parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora.data.conversations import MAX_TEXT
from qlora.data.keys import COLUMNS, SHAPES_OF, is_empty, match_shape
from qlora.data.python_rows import PythonRows
from qlora.data.rows import (
    BadRow,
    Record,
    arrow_record,
    as_row,
    collect_bad_row,
    explain_json,
    find_doubled,
    find_mixed,
    load_json,
)  # fmt: skip
from qlora.system.errors import InputError
from qlora.system.wording import describe, quote, shorten

COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4", ".7z")
READ_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # of a .jsonl file
PARQUET_ROWS = 256  # held in memory at a time
Rows = Generator[Record | BadRow, None, None]


def read_records(
    source: str | PythonRows,
    split: str = "train",
    bad_rows: list[BadRow] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Record]:
    """Read every record of a source (see `stream_records`).

    Args:
        bad_rows: collects unreadable rows and reading continues; None: raise at the first.
    Raises:
        BadRow: a row cannot be read and bad_rows is None.
    """
    records: list[Record] = []
    with closing(stream_records(source, split, columns)) as rows:
        for row in rows:
            if isinstance(row, BadRow):
                collect_bad_row(row, bad_rows)
            else:
                records.append(row)
    return records


def stream_records(
    source: str | PythonRows,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    kind: str = "answers",
) -> Rows:
    """Yield the rows of a local file, of one split of a hub dataset, or from Python.

    Args:
        source:  a .json, .jsonl, .csv or .parquet file, or a hub id (`owner/name`) if no such path exists; or rows
            from Python.
        split:   the hub split or a slice such as `train[:1000]`; ignored otherwise.
        columns: column in SHAPES_OF[kind] -> its name in the source.
    Yields:
        A Record, or a BadRow for an unreadable row.
    Raises:
        InputError: the source is missing, of an unknown kind, unreadable as a whole, or empty.
    """
    check_columns(columns or {}, kind)
    rows = _open_source(source, split)
    num_rows = 0
    try:
        with closing(rows):
            for row in rows:
                num_rows += 1
                yield _map_columns(row, columns, kind) if columns and isinstance(row, Record) else row
    except OSError as error:
        raise InputError(f"{source} cannot be read; check its permissions ({error}).") from error
    if num_rows == 0:
        raise InputError(f"{source} has no records; give a source with at least one.")


def _open_source(source: str | PythonRows, split: str) -> Rows:
    if isinstance(source, PythonRows):
        return source.stream()
    path = Path(source)
    if path.is_dir():
        raise InputError(
            f"{source} is a directory without files of one kind; name one .json, .jsonl, .csv or .parquet file in "
            f"it, or several as '{path}/*.parquet'."
        )
    if path.exists() and not path.is_file():  # it could be read only once, and waited for
        raise InputError(f"{source} is a pipe or a device, not a file; write its rows to a file first.")
    if path.suffix.lower() in COMPRESSED and path.exists():
        if path.suffix.lower() in READ_COMPRESSED and path.with_suffix("").suffix.lower() == ".jsonl":
            return _read_compressed(source)
        raise InputError(f"{source} is compressed; only .jsonl.gz and .jsonl.zst are read: decompress it first.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.exists():
        raise InputError(f"{source} ends in '{path.suffix}'; use .json, .jsonl, .csv or .parquet.")
    if reader is None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        return _read_hub(source, split)
    if reader is None or not path.exists():
        raise InputError(f"{source} does not exist; give the path of a file or a hub id such as owner/name.")
    return reader(source)


def identify_source(source: str | PythonRows, split: str = "train") -> list[Any] | None:
    """A key that changes with the source's content: a file's path, size and times; a hub dataset's fingerprint; a
    digest of rows from Python, or None if they have none.

    Raises:
        InputError: the source does not exist.
    """
    if isinstance(source, PythonRows):
        return source.identity()
    path = Path(source)
    if path.is_file():
        status = path.stat()  # ctime too: `cp -p` and `touch` can set the other times
        return [source, str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    _open_source(source, split).close()
    return [source, split, str(_load_hub(source, split)._fingerprint)]


def check_columns(columns: Mapping[str, str], kind: str = "answers") -> None:
    """InputError if a key is not a column of this kind of rows (SHAPES_OF); it lists the valid names."""
    known = {name for _, names, optional in SHAPES_OF[kind] for name in (*names, *optional)}
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise InputError(
            f"Unknown column {quote(unknown[0])} in --columns; write NAME=COLUMN, where COLUMN is in the data and "
            f"NAME is one of {', '.join(sorted(known))}."
        )


def _map_columns(record: Record, columns: Mapping[str, str], kind: str) -> Record | BadRow:
    """Rename the record's columns by `columns`; of the others, keep those of a shape that has all of these."""
    absent = [column for column in columns.values() if column not in record.fields]
    if absent:
        there = shorten(", ".join(sorted(map(quote, record.fields))), 200)
        return BadRow(record.origin, f"--columns names {quote(absent[0])}, but the columns are [{there}].")
    shapes = [
        {*names, *optional} for _, names, optional in SHAPES_OF[kind] if columns.keys() & {*names, *optional}
    ]
    whole = [shape for shape in shapes if shape >= columns.keys()]
    partners = set[str]().union(*(whole or shapes))
    taken = set(columns.values())
    fields = {name: value for name, value in record.fields.items() if name not in taken and name in partners}
    unused = [name for name in record.fields if name not in taken and name not in fields]
    fields |= {name: record.fields[column] for name, column in columns.items()}
    notes = ((COLUMNS, name) for name in unused if not is_empty(record.fields[name]))
    return Record(fields, record.origin, (*record.notes, *notes))


def _refuse_utf16(source: str) -> None:
    with open(source, "rb") as file:
        mark = file.read(2)
    if mark in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{source}: begins with the bytes {mark.hex(' ')}, so it is UTF-16; save it as UTF-8.")


def _bad_utf8(error: UnicodeDecodeError, start: int = 0) -> str:
    """Describe the byte that is not UTF-8, counted from `start`, and the text before it."""
    before = error.object[max(start, error.start - 20) : error.start].decode("utf-8", "replace")
    place = f"byte {error.start - start + 1}, 0x{error.object[error.start]:02x} after {quote(before)}"
    return f"{place}, is not valid UTF-8; save the file as UTF-8"


def parts_of(directory: Path) -> list[str]:
    """The data files of a directory, in the order of their names, if all of them are of one kind; else none."""
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.name[0] not in "._")
    kinds = {"".join(file.suffixes[-2:] if file.suffix.lower() in COMPRESSED else [file.suffix]) for file in files}
    readable = {*_READERS, *(f".jsonl{suffix}" for suffix in READ_COMPRESSED)}
    return [str(file) for file in files] if len(kinds) == 1 and kinds <= readable else []


def _read_compressed(source: str) -> Rows:
    import pyarrow

    compression = READ_COMPRESSED[Path(source).suffix.lower()]
    try:
        with pyarrow.input_stream(source, compression=compression) as stream:
            yield from _read_lines(io.BufferedReader(stream), source)
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = shorten(" ".join(str(error).split()), 200)
        raise InputError(f"{source}: not readable as {compression} ({reason}); write the file again.") from error


def _read_jsonl(source: str) -> Rows:
    _refuse_utf16(source)
    with open(source, "rb") as file:
        yield from _read_lines(file, source)


def _read_lines(file: BinaryIO, source: str) -> Rows:
    number = 0
    while line := file.readline(MAX_TEXT + 1):
        number += 1
        origin = f"{source}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_TEXT and not line.endswith(b"\n"):
            start, size = line[:24], len(line)
            while line and not line.endswith(b"\n"):
                line = file.readline(2**20)
                size += len(line)
            begins = f"the line begins {quote(start.decode('utf-8', 'replace'))} and has {size:,} bytes"
            yield BadRow(origin, f"{begins}, more than {MAX_TEXT:,}; split it, one JSON object on each line.")
        elif line.strip():
            yield _parse_line(line, origin)


_CUT_OFF = " (the line has no line break at its end: the file may be truncated)"


def _parse_line(line: bytes, origin: str) -> Record | BadRow:
    cut = "" if line.endswith(b"\n") else _CUT_OFF  # only the last line may lack its end
    text = ""
    try:
        text = line.decode().rstrip()  # else an error at the line's end would count columns from there
        value, may_have_flaw = load_json(text)
    except UnicodeDecodeError as error:
        return BadRow(origin, f"{_bad_utf8(error)}{cut}.")
    except ValueError as error:
        return BadRow(origin, f"{explain_json(error, text)}; write one JSON object on each line{cut}.")
    return as_row(value, origin, may_have_flaw)


def _read_json(source: str) -> Rows:
    _refuse_utf16(source)
    data = Path(source).read_bytes()
    try:
        text = data.decode("utf-8-sig").rstrip() or "[]"
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start) + 1
        raise InputError(f"{source}:{line}: {_bad_utf8(error, start)}.") from error
    del data
    try:
        value, may_have_flaw = load_json(text)
    except ValueError as error:
        remedy = "fix it, or rename it to .jsonl if each line is an object"
        line = 1
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
            if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
                remedy = "the file may be truncated: write it again"
        raise InputError(f"{source}:{line}: {explain_json(error, text)}; {remedy}.") from error
    if isinstance(value, dict):
        lists = [field for field in value.values() if isinstance(field, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        holds = describe(value)
        raise InputError(
            f"{source}: holds {holds}, not a list of records; write a list of objects, alone or in one field."
        )
    for number, item in enumerate(value, start=1):
        yield as_row(item, f"{source} record {number}", may_have_flaw)


def _read_csv(source: str) -> Rows:
    _refuse_utf16(source)
    previous_limit = csv.field_size_limit(2**31 - 1)  # default: 131,072 characters per field
    header: list[str] = []
    first_line = 1  # of the row: a quoted field may span lines
    cut = ""

    def read_lines(file: Iterator[str]) -> Iterator[str]:
        nonlocal cut
        for line in file:
            cut = "" if line.endswith(("\n", "\r")) else _CUT_OFF  # only the last line may lack its end
            yield line

    # A byte that is not UTF-8 is read as a surrogate, so that only its row is lost, not the file.
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(read_lines(file), strict=True)
        try:
            for row in rows:
                origin = f"{source}:{first_line}"
                first_line = rows.line_num + 1
                if not row:
                    continue
                problem = _find_bad_byte(row, header)
                if not header:
                    header = row
                    if (doubled := find_doubled(header)) is not None:
                        problem = f"the header names the column {quote(doubled)} twice; rename one"
                    if problem:
                        raise InputError(f"{origin}: {problem}.")
                elif problem:
                    yield BadRow(origin, f"{problem}.")
                elif len(row) != len(header):
                    sizes = f"{len(row)} field(s) where the header has {len(header)}, the last {quote(row[-1])}"
                    remedy = "fill it in" if len(row) < len(header) else "quote fields that contain commas"
                    yield BadRow(origin, f"{sizes}; {remedy}{cut}.")
                else:
                    yield Record(dict(zip(header, row, strict=True)), origin)
        except csv.Error as error:
            raise InputError(f"{source}:{first_line}: not valid CSV ({error}); check its quotes{cut}.") from error
        finally:
            csv.field_size_limit(previous_limit)


def _find_bad_byte(row: list[str], header: list[str]) -> str | None:
    for column, text in enumerate(row):
        if found := re.search("[\udc80-\udcff]", text):
            name = quote(header[column]) if column < len(header) else f"column {column + 1}"
            byte, before = ord(found[0]) - 0xDC00, quote(text[max(0, found.start() - 20) : found.start()])
            return f"{name} holds 0x{byte:02x} after {before}, not valid UTF-8; save the file as UTF-8"
    return None


def _read_parquet(source: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            if (doubled := find_doubled(file.schema_arrow.names)) is not None:
                raise InputError(f"{source}: the column {quote(doubled)} occurs twice; rename one.")
            for batch in file.iter_batches(PARQUET_ROWS):
                try:
                    rows = batch.to_pylist()
                except (pyarrow.ArrowException, ValueError, OverflowError):
                    rows = [None] * batch.num_rows  # read one by one below
                for index, row in enumerate(rows):
                    number += 1
                    origin = f"{source} row {number}"
                    yield _read_parquet_row(batch, index, origin) if row is None else arrow_record(row, origin)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError) or getattr(error, "errno", None) is not None:
            raise  # our own, or an error of the disk rather than of the content
        reason = shorten(" ".join(str(error).split()), 200)
        raise InputError(f"{source}: not readable as Parquet ({reason}); write the file again.") from error


def _read_parquet_row(batch: Any, index: int, origin: str) -> Record | BadRow:
    """A row of a batch with values that Python cannot hold, such as a day of the year 20,000.

    In a column that has no meaning here they stand as what they are, to be noted; elsewhere they make a bad row.
    """
    import pyarrow

    fields: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            if name in _NAMES:
                return BadRow(origin, f"{quote(name)}, {_bad_utf8(error)}.")
            fields[name] = Unreadable(str(column.type))
        except (pyarrow.ArrowException, ValueError, OverflowError):
            fields[name] = Unreadable(str(column.type))
    return arrow_record(fields, origin)


def _load_hub(name: str, split: str) -> Any:
    """Load a hub dataset: memory-mapped Arrow files in the cache of `datasets`.

    (Its streaming mode needs no disk, but has no slices and cannot start again without the network.)
    """
    import datasets

    try:
        if datasets.load_dataset_builder(name).name != "csv":
            return datasets.load_dataset(name, split=split)
        # As a local file: pandas would read NA and None as null, and 007 as a number.
        found = datasets.load_dataset(name, split=split, na_filter=False)
        if {getattr(kind, "dtype", None) for kind in found.features.values()} <= {"string", "large_string"}:
            return found
        texts = datasets.Features(dict.fromkeys(found.features, datasets.Value("string")))
        return datasets.load_dataset(name, split=split, na_filter=False, features=texts)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"No file '{name}' exists, and no such dataset with a split '{split}' could be loaded from the hub "
            f"({reason}); check the path, the id, the split and the network."
        ) from error


def _read_hub(name: str, split: str) -> Rows:
    dataset = _load_hub(name, split)
    notes = find_mixed(dataset.features or {})
    for number, row in enumerate(dataset, start=1):
        yield arrow_record(dict(row), f"{name} row {number}", notes)


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


_NAMES = {name for shapes in SHAPES_OF.values() for _, names, optional in shapes for name in (*names, *optional)}


@dataclass(frozen=True)
class Unreadable:
    """A value of a Parquet column that has no counterpart in Python."""

    kind: str

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def detect_format(fields: dict[str, Any], origin: str, kind: str = "answers") -> str:
    """The name of the record's shape in SHAPES_OF[kind]; BadRow if none fits."""
    return match_shape(fields, origin, kind)[0]
