"""From a file or a hub id to conversations: read_records, then to_messages.

    read_records   .json, .jsonl, .csv, .parquet or a hub id -> [Record(fields, origin)]
    to_messages    one record, in any shape listed below      -> [{"role", "content"}]

    format              columns (others are ignored, and so are columns that hold null)
    messages            messages: [{role, content}], as OpenAI writes it; "weight": 0 makes an answer context
    sharegpt            conversations: [{from: human | gpt | system, value}]
    alpaca              instruction, output, perhaps input; or Dolly's instruction, response, perhaps context
    prompt_completion   prompt, completion (or response): each a text, or a list of messages as TRL writes it
    question_answer     question, answer
    text                text: a document, trained as it stands; whole rendered conversations may stand here

Each record is recognised by itself, so shapes may mix. It remembers its origin, counted from 1, and every
error names that place. A row that cannot be used is a BadRow: it ends the reading, or is collected while the
reading goes on. A file that is broken as a whole is a plain InputError, and always ends it.
"""

import codecs
import csv
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import InputError

# Bytes of a line of JSONL, characters of one text. A million characters take about a second to tokenise, for a
# row that is cut at --max-length tokens all the same; and a line without an end is often no JSONL at all.
MAX_TEXT = 16 * 2**20

# (format, columns, optional column joined to the prompt); the first whose columns are all there wins.
_SHAPES = (
    ("messages", ("messages",), None),
    ("sharegpt", ("conversations",), None),
    ("alpaca", ("instruction", "output"), "input"),
    ("alpaca", ("instruction", "response"), "context"),
    ("prompt_completion", ("prompt", "completion"), None),
    ("prompt_completion", ("prompt", "response"), None),
    ("question_answer", ("question", "answer"), None),
    ("text", ("text",), None),
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
_ROLES |= {"assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Record:
    """One example as its source wrote it, and where it stood, such as `train.jsonl:17`."""

    fields: dict[str, Any]
    origin: str


class BadRow(InputError):
    """One row that cannot be used: where it stands, and its problem with the remedy, as one sentence."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


_Rows = Generator[Record | BadRow, None, None]


def collect_bad_row(error: BadRow, bad_rows: list[BadRow] | None) -> None:
    """Put the error into the list; without a list, raise it."""
    if bad_rows is None:
        raise error
    bad_rows.append(BadRow(error.where, error.problem))  # anew: the traceback would keep the row in memory


def sort_by_place(bad_rows: list[BadRow]) -> None:
    """Bring the bad rows of one source, found while reading and after it, into the source's order."""
    bad_rows.sort(key=lambda row: [int(number) for number in re.findall(r"\d+$", row.where)])


def read_records(source: str, split: str = "train", bad_rows: list[BadRow] | None = None) -> list[Record]:
    """Read every record of a local file, or of one split of a hub dataset.

    Args:
        source:   a .json, .jsonl, .csv or .parquet file, or a hub id (`owner/name`) where no such path exists.
        split:    the hub split, slices such as `train[:1000]` included; a file has but one and ignores it.
        bad_rows: receives the rows that cannot be read, and reading goes on; None: the first one is raised.
    Raises:
        BadRow: a row cannot be read, and there is no list for it.
        InputError: the source is missing, of an unknown kind, broken as a whole, or holds no rows.
    """
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a directory; name one .json, .jsonl, .csv or .parquet file in it.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.exists():
        raise InputError(f"{source} ends in '{path.suffix}'; use .json, .jsonl, .csv or .parquet.")
    if reader is None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        rows = _read_hub(source, split)
    elif reader is None or not path.exists():
        raise InputError(f"{source} does not exist; give the path of a file or a hub id such as owner/name.")
    else:
        rows = reader(source)
    records: list[Record] = []
    num_rows = 0
    try:
        with closing(rows):
            for row in rows:
                num_rows += 1
                if isinstance(row, BadRow):
                    collect_bad_row(row, bad_rows)
                else:
                    records.append(row)
    except OSError as error:
        raise InputError(f"{source} cannot be read; check its permissions ({error}).") from error
    if num_rows == 0:
        raise InputError(f"{source} holds no records; give a source with at least one.")
    return records


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 40
_short.maxlevel = _short.maxdict = _short.maxlist = _short.maxtuple = 3


def quote(value: Any) -> str:
    """A value for an error: its repr, so that control characters show and stay on one line, shortened."""
    return "null" if value is None else _shorten(_short.repr(value), 60)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _describe(value: Any) -> str:
    return "null" if value is None else f"{quote(value)} ({type(value).__name__})"


class _DoubledKey(dict[str, Any]):
    """A JSON object that gives `key` more than once."""

    key: Any


def _find_doubled(names: list[str]) -> str | None:
    """The first name that stands there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _load_json(text: str) -> tuple[Any, bool]:
    """A JSON value, and whether something in it needs `_find_flaw`: NaN, an infinity, a key given twice.

    Raises:
        ValueError: not JSON, or nested too deeply to be read.
    """
    flaws: list[str] = []

    def read_constant(name: str) -> float:
        flaws.append(name)
        return float(name)

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            fields = _DoubledKey(fields)
            fields.key = _find_doubled([key for key, _ in pairs])
            flaws.append("a key given twice")
        return fields

    try:
        value = json.JSONDecoder(object_pairs_hook=build, parse_constant=read_constant).decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value, bool(flaws)


def _find_flaw(record: Any) -> str | None:
    """What `_load_json` let through in this record, as a problem with its remedy."""
    stack = [("the row", record)]  # not a recursion: JSON may be nested as deeply as Python's own stack
    while stack:
        name, value = stack.pop()
        if isinstance(value, _DoubledKey):
            last = quote(value[value.key])
            return f"{name} gives the key {quote(value.key)} twice, in the end as {last}; keep one of them"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {json.dumps(value)}, which is not a JSON value; write null or a number"
        if isinstance(value, dict):
            stack += [(quote(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [(name, item) for item in value]
    return None


def _explain_json(error: ValueError, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({_shorten(' '.join(str(error).split()), 80)})"
    near = quote(text[max(0, error.pos - 10) : error.pos + 20])
    return f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno}, near {near})"


def _as_row(value: Any, origin: str, may_have_flaw: bool) -> Record | BadRow:
    if not isinstance(value, dict):
        return BadRow(origin, f'the row is {_describe(value)}; write an object such as {{"text": "..."}}.')
    flaw = _find_flaw(value) if may_have_flaw else None
    return BadRow(origin, f"{flaw}.") if flaw else Record(value, origin)


def _refuse_utf16(source: str) -> None:
    with open(source, "rb") as file:
        mark = file.read(2)
    if mark in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{source}: begins with the bytes {mark.hex(' ')}, so it is UTF-16; save it as UTF-8.")


def _bad_utf8(error: UnicodeDecodeError, start: int = 0) -> str:
    """The byte that is not UTF-8, counted from `start`, and what stands before it."""
    before = error.object[max(start, error.start - 20) : error.start].decode("utf-8", "replace")
    place = f"byte {error.start - start + 1}, 0x{error.object[error.start]:02x} after {quote(before)}"
    return f"{place}, is not valid UTF-8; save the file as UTF-8"


def _read_jsonl(source: str) -> _Rows:
    _refuse_utf16(source)
    number = 0
    with open(source, "rb") as file:
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


_CUT_OFF = " (the line has no end: the file may be cut off)"


def _parse_line(line: bytes, origin: str) -> Record | BadRow:
    cut = "" if line.endswith(b"\n") else _CUT_OFF  # only the last line may lack its end
    text = ""
    try:
        text = line.decode().rstrip()  # an error after the line's end would count its column from there
        value, may_have_flaw = _load_json(text)
    except UnicodeDecodeError as error:
        return BadRow(origin, f"{_bad_utf8(error)}{cut}.")
    except ValueError as error:
        return BadRow(origin, f"{_explain_json(error, text)}; write one JSON object on each line{cut}.")
    return _as_row(value, origin, may_have_flaw)


def _read_json(source: str) -> _Rows:
    _refuse_utf16(source)
    data = Path(source).read_bytes()
    try:
        text = data.decode("utf-8-sig").rstrip() or "[]"
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start) + 1
        raise InputError(f"{source}:{line}: {_bad_utf8(error, start)}.") from error
    del data
    try:
        value, may_have_flaw = _load_json(text)
    except ValueError as error:
        remedy = "mend it, or name it .jsonl if each line is an object"
        line = 1
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
            if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
                remedy = "the file may be cut off: write it anew"
        raise InputError(f"{source}:{line}: {_explain_json(error, text)}; {remedy}.") from error
    if isinstance(value, dict):
        lists = [field for field in value.values() if isinstance(field, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        holds = _describe(value)
        raise InputError(
            f"{source}: holds {holds}, no list of records; write a list of objects, alone or in one field."
        )
    for number, item in enumerate(value, start=1):
        yield _as_row(item, f"{source} record {number}", may_have_flaw)


def _read_csv(source: str) -> _Rows:
    _refuse_utf16(source)
    previous_limit = csv.field_size_limit(2**31 - 1)  # by default 131,072 characters a field
    header: list[str] = []
    first_line = 1  # of the row: a quoted field may span lines
    cut = ""

    def read_lines(file: Iterator[str]) -> Iterator[str]:
        nonlocal cut
        for line in file:
            cut = "" if line.endswith(("\n", "\r")) else _CUT_OFF  # only the last line may lack its end
            yield line

    # A byte that is not UTF-8 is read as a surrogate, so that it costs its row and not the file.
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
                    if (doubled := _find_doubled(header)) is not None:
                        problem = f"the header names the column {quote(doubled)} twice; rename one"
                    if problem:
                        raise InputError(f"{origin}: {problem}.")
                elif problem:
                    yield BadRow(origin, f"{problem}.")
                elif len(row) != len(header):
                    sizes = f"{len(row)} field(s) where the header has {len(header)}, the last {quote(row[-1])}"
                    remedy = "fill it up" if len(row) < len(header) else "quote the fields that hold commas"
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


def _read_parquet(source: str) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            if (doubled := _find_doubled(file.schema_arrow.names)) is not None:
                raise InputError(f"{source}: the column {quote(doubled)} stands there twice; rename one.")
            for batch in file.iter_batches():
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:
                    rows = [None] * batch.num_rows  # one by one, then
                for index, row in enumerate(rows):
                    number += 1
                    origin = f"{source} row {number}"
                    yield _read_parquet_row(batch, index, origin) if row is None else Record(row, origin)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError) or getattr(error, "errno", None) is not None:
            raise  # ours, or the disk's word and not pyarrow's on the content
        reason = _shorten(" ".join(str(error).split()), 200)
        raise InputError(f"{source}: not readable as Parquet ({reason}); write the file anew.") from error


def _read_parquet_row(batch: Any, index: int, origin: str) -> Record | BadRow:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return BadRow(origin, f"{quote(name)}, {_bad_utf8(error)}.")
    return Record(fields, origin)


def _read_hub(name: str, split: str) -> _Rows:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"'{name}' is no file here, and its split '{split}' could not be loaded from the hub ({reason}); "
            "check the path, the id, the split and the network."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield Record(dict(row), f"{name} row {number}")


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def detect_format(fields: dict[str, Any], origin: str) -> str:
    """The name of the record's shape, from the module's table; BadRow where none fits."""
    return _match_shape(fields, origin)[0]


def _match_shape(fields: dict[str, Any], origin: str) -> tuple[str, tuple[str, ...], str | None]:
    filled = {name for name, value in fields.items() if value is not None}
    for columns in (filled, set(fields)):  # the second pass is for the error that names the null column
        for shape in _SHAPES:
            if columns.issuperset(shape[1]):
                return shape
    known = "; ".join(" + ".join(columns) for _, columns, _ in _SHAPES)
    names = _shorten(", ".join(sorted(map(quote, fields))), 200)
    raise BadRow(origin, f"unknown columns [{names}]; rename them to one of: {known}.")


def to_messages(record: Record) -> list[dict[str, Any]]:
    """One record as a conversation: perhaps a system message, then user and assistant in turn.

    Turns after the last answer have no target and are left out. A `text` record becomes
    [{"role": "document", "content": text}]: no template, every token a target. Answers that are context only
    ("weight": 0, or inside a prompt that is a list of messages) keep the key "weight" with the value 0.

    Raises:
        BadRow: a text is missing, too long or holds what is no character, a role is unknown or out of turn, or
            there is no answer.
    """
    origin = record.origin
    _, columns, extra_column = _match_shape(record.fields, origin)
    values = [record.fields[column] for column in columns]
    if columns == ("text",):
        return [{"role": "document", "content": _check_text(values[0], "text", origin)}]
    if len(columns) == 1:
        return _check_order(_read_turns(values[0], columns[0], origin), origin)
    if extra_column and record.fields.get(extra_column) not in (None, ""):
        extra = _check_text(record.fields[extra_column], extra_column, origin)
        values[0] = _check_text(values[0], columns[0], origin) + "\n\n" + extra
    prompt = _read_side(values[0], columns[0], "user", origin)
    prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    return _check_order(prompt + _read_side(values[1], columns[1], "assistant", origin), origin)


def _check_text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise BadRow(origin, f"{name} is {_describe(value)}, not text; fill it in or remove the record.")
    if len(value) > MAX_TEXT:
        size = f"{name} has {len(value):,} characters, more than {MAX_TEXT:,}"
        raise BadRow(origin, f"{size}, and begins {quote(value[:40])}; split it into several records.")
    if found := re.search("[\0\ud800-\udfff]", value):
        kind = "a NUL" if found[0] == "\0" else "half of a surrogate pair"
        near = quote(value[max(0, found.start() - 10) : found.end() + 10])
        raise BadRow(origin, f"{name} holds {kind} at character {found.end()}, in {near}; remove it.")
    return value


def _read_side(value: Any, column: str, role: str, origin: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _read_turns(value, column, origin)
    return [{"role": role, "content": _check_text(value, column, origin)}]


def _read_turns(value: Any, column: str, origin: str) -> list[dict[str, Any]]:
    wanted = "messages, each with a role and a content"
    if not isinstance(value, list):
        raise BadRow(origin, f"{column} is {_describe(value)}; write a list of {wanted}.")
    turns = []
    for number, turn in enumerate(value, start=1):
        name = f"message {number} of {column}"
        if not isinstance(turn, dict):
            raise BadRow(origin, f"{name} is {_describe(turn)}; write a list of {wanted}.")
        role, weight = turn.get("role", turn.get("from")), turn.get("weight")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(origin, f"{name} has the role {quote(role)}; use {', '.join(_ROLES)}.")
        for key in ("tool_calls", "function_call"):
            if turn.get(key):
                problem = f"{name} has the {key} {quote(turn[key])}, which only work as text"
                raise BadRow(origin, f"{problem}; write the call into the content.")
        if weight not in (None, 0, 1):
            raise BadRow(origin, f"{name} has the weight {quote(weight)}; use 0 or 1.")
        text = _check_text(turn.get("content", turn.get("value")), f"the content of {name}", origin)
        turns.append({"role": _ROLES[role], "content": text} | ({"weight": 0} if weight == 0 else {}))
    return turns


def _check_order(turns: list[dict[str, Any]], origin: str) -> list[dict[str, Any]]:
    start = 1 if turns and turns[0]["role"] == "system" else 0
    for index, turn in enumerate(turns[start:]):
        expected = ("user", "assistant")[index % 2]
        if turn["role"] != expected:
            which = f"message {start + index + 1}, {quote(turn['content'])},"
            raise BadRow(
                origin,
                f"{which} is from the {turn['role']}, not the {expected}; let user and assistant alternate, "
                "the user first, after any system message.",
            )
    num_kept = max((index + 1 for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if num_kept == 0:
        roles = ", ".join(turn["role"] for turn in turns) or "none at all"
        raise BadRow(
            origin,
            f"nothing to learn without an assistant message (the messages are from: {roles}); "
            "add one or remove the record.",
        )
    return turns[:num_kept]
