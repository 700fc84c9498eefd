"""From a file or a hub id to conversations: read_records, then to_messages.

    read_records   .json, .jsonl, .csv, .parquet or a hub id -> [Record(fields, origin)]
    to_messages    one record, in any shape listed below      -> [{"role", "content"}]

    format              columns (others are ignored, and so are columns that hold null)
    messages            messages: [{role, content}], as OpenAI writes it; "weight": 0 makes an answer context
    sharegpt            conversations: [{from: human | gpt | system, value}]
    alpaca              instruction, output, perhaps input; or Dolly's instruction, response, perhaps context
    prompt_completion   prompt, completion (or response): each a text, or a list of messages as TRL writes it
    question_answer     question, answer
    text                text: a document, trained as it stands

Each record is recognised by itself, so shapes may mix. It remembers its origin, counted from 1, and every
error names that place.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import InputError

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


def read_records(source: str, split: str = "train") -> list[Record]:
    """Read every record of a local file, or of one split of a hub dataset.

    Args:
        source: a .json, .jsonl, .csv or .parquet file, or a hub id (`owner/name`) where no such path exists.
        split:  the hub split, slices such as `train[:1000]` included; a file has but one and ignores it.
    Raises:
        InputError: the source is missing, of an unknown kind, broken (file and line are named) or empty.
    """
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a directory; name one .json, .jsonl, .csv or .parquet file in it.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.exists():
        raise InputError(f"{source} ends in '{path.suffix}'; use .json, .jsonl, .csv or .parquet.")
    if reader is None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        records = _read_hub(source, split)
    elif reader is None or not path.exists():
        raise InputError(f"{source} does not exist; give the path of a file or a hub id such as owner/name.")
    else:
        try:
            records = list(reader(source))
        except OSError as error:
            raise InputError(f"{source} cannot be read; check its permissions ({error}).") from error
    if not records:
        raise InputError(f"{source} holds no records; give a source with at least one.")
    return records


def _read_lines(source: str) -> Iterator[str]:
    """Lines with their ends, decoded one by one so that broken UTF-8 is named by its line."""
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{source}:{number}, byte {error.start + 1}"
                raise InputError(f"{where}: not valid UTF-8; save the file as UTF-8.") from error


def _parse_json(text: str, origin: str, remedy: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        reason = re.sub(r"line 1 | \(char \d+\)", "", str(error))  # a line of JSONL is always its own line 1
        raise InputError(f"{origin}: not valid JSON ({reason}); {remedy}.") from error


def _as_record(value: Any, origin: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f'{origin}: got {type(value).__name__}; write an object such as {{"text": "..."}}.')
    return Record(value, origin)


def _read_jsonl(source: str) -> Iterator[Record]:
    for number, line in enumerate(_read_lines(source), start=1):
        if line.strip():
            origin = f"{source}:{number}"
            yield _as_record(_parse_json(line, origin, "write one JSON object on each line"), origin)


def _read_json(source: str) -> Iterator[Record]:
    text = "".join(_read_lines(source)).rstrip() or "[]"
    value = _parse_json(text, source, "mend it, or name it .jsonl if each line is an object")
    if isinstance(value, dict):
        lists = [field for field in value.values() if isinstance(field, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise InputError(f"{source}: no list of records; write a list of objects, alone or in one field.")
    for number, item in enumerate(value, start=1):
        yield _as_record(item, f"{source} record {number}")


def _read_csv(source: str) -> Iterator[Record]:
    previous_limit = csv.field_size_limit(2**31 - 1)  # by default 131,072 characters a field
    rows = csv.reader(_read_lines(source), strict=True)
    header: list[str] = []
    first_line = 1  # of the row: a quoted field may span lines
    try:
        for row in rows:
            origin = f"{source}:{first_line}"
            first_line = rows.line_num + 1
            if not header:
                header = row
                if len(set(header)) < len(header):
                    raise InputError(f"{origin}: the header {header} names a column twice; rename one.")
            elif row:
                if len(row) != len(header):
                    sizes = f"{len(row)} fields where the header has {len(header)}"
                    raise InputError(f"{origin}: {sizes}; quote the fields that hold commas.")
                yield Record(dict(zip(header, row, strict=True)), origin)
    except csv.Error as error:
        raise InputError(f"{source}:{first_line}: not valid CSV ({error}); check its quotes.") from error
    finally:
        csv.field_size_limit(previous_limit)


def _read_parquet(source: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(source).read().to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not readable as Parquet ({error}); write the file anew.") from error
    for number, row in enumerate(rows, start=1):
        yield Record(row, f"{source} row {number}")


def _read_hub(name: str, split: str) -> list[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"'{name}' is no file here, and its split '{split}' could not be loaded from the hub ({reason}); "
            "check the path, the id, the split and the network."
        ) from error
    return [Record(dict(row), f"{name} row {number}") for number, row in enumerate(rows, start=1)]


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def detect_format(fields: dict[str, Any], origin: str) -> str:
    """The name of the record's shape, from the module's table; InputError where none fits."""
    return _match_shape(fields, origin)[0]


def _match_shape(fields: dict[str, Any], origin: str) -> tuple[str, tuple[str, ...], str | None]:
    filled = {name for name, value in fields.items() if value is not None}
    for columns in (filled, set(fields)):  # the second pass is for the error that names the null column
        for shape in _SHAPES:
            if columns.issuperset(shape[1]):
                return shape
    known = "; ".join(" + ".join(columns) for _, columns, _ in _SHAPES)
    raise InputError(f"{origin}: unknown columns {sorted(fields)}; rename them to one of: {known}.")


def to_messages(record: Record) -> list[dict[str, Any]]:
    """One record as a conversation: perhaps a system message, then user and assistant in turn.

    Turns after the last answer have no target and are left out. A `text` record becomes
    [{"role": "document", "content": text}]: no template, every token a target. Answers that are context only
    ("weight": 0, or inside a prompt that is a list of messages) keep the key "weight" with the value 0.

    Raises:
        InputError: a text is missing, a role is unknown or out of turn, or there is no answer.
    """
    origin = record.origin
    _, columns, extra_column = _match_shape(record.fields, origin)
    values = [record.fields[column] for column in columns]
    if columns == ("text",):
        return [{"role": "document", "content": _check_text(values[0], "text", origin)}]
    if len(columns) == 1:
        return _check_order(_read_turns(values[0], columns[0], origin), origin)
    if extra_column and record.fields.get(extra_column):
        extra = _check_text(record.fields[extra_column], extra_column, origin)
        values[0] = _check_text(values[0], columns[0], origin) + "\n\n" + extra
    prompt = _read_side(values[0], columns[0], "user", origin)
    prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    return _check_order(prompt + _read_side(values[1], columns[1], "assistant", origin), origin)


def _check_text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{origin}: {name} is {kind}, not text; fill it in or remove the record.")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{origin}: {name} holds half of a surrogate pair; remove that character.")
    return value


def _read_side(value: Any, column: str, role: str, origin: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _read_turns(value, column, origin)
    return [{"role": role, "content": _check_text(value, column, origin)}]


def _read_turns(value: Any, column: str, origin: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{origin}: {column} must be a list of messages, each with a role and a content.")
    turns = []
    for number, turn in enumerate(value, start=1):
        role, weight = str(turn.get("role", turn.get("from"))), turn.get("weight")
        if role not in _ROLES:
            raise InputError(f"{origin}: message {number} has the role '{role}'; use {', '.join(_ROLES)}.")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise InputError(f"{origin}: message {number} calls a tool, which only works as text.")
        if weight not in (None, 0, 1):
            raise InputError(f"{origin}: message {number} has the weight {weight!r}; use 0 or 1.")
        text = _check_text(turn.get("content", turn.get("value")), f"the content of message {number}", origin)
        turns.append({"role": _ROLES[role], "content": text} | ({"weight": 0} if weight == 0 else {}))
    return turns


def _check_order(turns: list[dict[str, Any]], origin: str) -> list[dict[str, Any]]:
    start = 1 if turns and turns[0]["role"] == "system" else 0
    for index, turn in enumerate(turns[start:]):
        expected = ("user", "assistant")[index % 2]
        if turn["role"] != expected:
            raise InputError(
                f"{origin}: message {start + index + 1} is from the {turn['role']}, not the {expected}; "
                "let user and assistant alternate, the user first, after any system message."
            )
    num_kept = max((index + 1 for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if num_kept == 0:
        raise InputError(f"{origin}: nothing to learn without an assistant message; add one or remove it.")
    return turns[:num_kept]
