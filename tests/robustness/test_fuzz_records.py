"""Any bytes as a data file: records, or one sentence; never another exception, never half a result.

    make test runs a few hundred inputs of each kind. The long form, 125,000 inputs in about ten minutes:
    QLORA_FUZZ=25000 python -m pytest tests/robustness/test_fuzz_records.py

What every input must satisfy, read with on_bad_row stop and skip: reading it and turning it into messages
returns, or raises an InputError whose message is one line and not long. Bad rows found are those that stop
finds first. Good rows between bad ones are all returned, in order.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.data.conversations import to_messages
from qlora.data.readers import read_records
from qlora.data.rows import BadRow, Record
from qlora.system.errors import InputError

NUM_INPUTS = int(os.environ.get("QLORA_FUZZ", "300"))
fuzz = settings(
    max_examples=NUM_INPUTS,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

COLUMNS = ["text", "prompt", "completion", "response", "instruction", "input", "output", "context", "question"]
COLUMNS += ["answer", "messages", "conversations", "x"]
TURN_KEYS = ["role", "from", "content", "value", "weight", "tool_calls", "function_call"]
ROLES = ["system", "developer", "user", "human", "assistant", "gpt", "tool", "USER", ""]

text = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["\0", "\ud800", "\udcff", "\x1b[0m", "\r\n", "=\"'"]
)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(
    scalar,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TURN_KEYS) | text, inner, max_size=4)
    ),
    max_leaves=12,
)
turn = st.fixed_dictionaries({}, optional={key: anything for key in TURN_KEYS}) | st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | anything, "content": text | anything},
    optional={"weight": st.sampled_from([0, 1, 0.5, None])},
)
value = text | st.lists(turn, max_size=5) | anything
row = st.dictionaries(st.sampled_from(COLUMNS) | text, value, max_size=5) | anything

MARKER = "good row"


def check(path: Path) -> tuple[list[Record], list[BadRow]]:
    """The property: (records that become messages, bad rows)."""
    stopped = None
    try:
        for record in read_records(str(path)):
            to_messages(record)
    except InputError as error:
        check_sentence(error)
        stopped = error
    bad_rows: list[BadRow] = []
    good = []
    try:
        for record in read_records(str(path), bad_rows=bad_rows):
            try:
                messages = to_messages(record)
            except BadRow as error:
                bad_rows.append(error)
                continue
            assert messages and all(isinstance(message["content"], str) for message in messages)
            "".join(message["content"] for message in messages).encode()  # a tokenizer could take it
            good.append(record)
    except InputError as error:
        check_sentence(error)
        assert not isinstance(error, BadRow) and stopped is not None
        return [], []
    for error in bad_rows:
        check_sentence(error)
    assert (stopped is None) == (not bad_rows)
    assert stopped is None or str(stopped) == str(bad_rows[0])
    return good, bad_rows


def check_sentence(error: InputError) -> None:
    sentence = str(error)
    assert sentence.isprintable() and sentence.endswith(".") and len(sentence) < 800, sentence


def dump(value: Any, ascii_only: bool) -> str:
    """JSON with surrogates and NaN left in, as careless writers leave them."""
    return json.dumps(value, ensure_ascii=ascii_only)


def encode(content: str) -> bytes:
    return content.encode("utf-8", "surrogatepass")


@fuzz
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from([*'{}[],:"\\ \n\r\t\0a1-.eN', "\xef\xbb\xbf", "null", "NaN", '"text"']))
    .map("".join)
    .map(encode),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_any_bytes(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    check(path)


@fuzz
@given(values=st.lists(row, max_size=4), ascii_only=st.booleans(), suffix=st.sampled_from([".jsonl", ".json"]))
def test_any_json_values_as_rows(tmp_path: Path, values: list[Any], ascii_only: bool, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    joined = "\n".join(dump(value, ascii_only) for value in values)
    path.write_bytes(encode(joined if suffix == ".jsonl" else dump(values, ascii_only)))
    check(path)


@fuzz
@given(fields=row)
def test_any_fields_as_a_record(fields: Any) -> None:
    """As Parquet and the hub give them: what JSON cannot spell is possible too."""
    if isinstance(fields, dict):
        try:
            to_messages(Record(fields, "a:1"))
        except BadRow as error:
            check_sentence(error)
            assert str(error).startswith("a:1: ")


VALID = [
    {"messages": [{"role": r, "content": c} for r, c in [("system", "é"), ("user", "Q"), ("assistant", "A\n")]]},
    {"instruction": '日本, "quoted"', "input": "x,y", "output": "1"},
    {"text": "once"},
    {"prompt": "a" * 50, "completion": "b"},
]


def valid_file(suffix: str) -> bytes:
    if suffix == ".jsonl":
        return encode("".join(dump(fields, False) + "\n" for fields in VALID))
    if suffix == ".json":
        return encode(dump({"rows": VALID}, False))
    file = io.StringIO()
    csv.writer(file).writerows(
        [["prompt", "completion", "id"], *([f'a\n"{n}", é', "b,", str(n)] for n in range(4))]
    )
    return encode(file.getvalue())


@fuzz
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".csv"]))
def test_damaged_files(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    """Bytes overwritten, inserted, taken out, and the end cut off."""
    content = bytearray(valid_file(suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.sampled_from([start, start + 1, start + 9, len(content)]))
        content[start:end] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"\n", b"\xff\xfe", b"\0", b"{", b","])
        )
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    check(path)


@fuzz
@given(
    lines=st.lists(
        st.just(None)
        | st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))
        | row.map(lambda value: encode(dump(value, False)).replace(b"\n", b"")),
        max_size=8,
    )
)
def test_good_lines_between_any_others_are_all_returned(tmp_path: Path, lines: list[bytes | None]) -> None:
    good = encode(dump({"text": MARKER}, True))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"".join((good if line is None else line) + b"\n" for line in lines))
    records, bad_rows = check(path)
    places = [f"{path}:{number}" for number, line in enumerate(lines, start=2) if line is None]
    assert [record.origin for record in records if record.fields == {"text": MARKER}] == places
    num_blank = sum(line is not None and not line.strip() for line in lines)
    assert len(records) + len(bad_rows) == 1 + len(lines) - num_blank


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_the_undamaged_files_are_good(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(valid_file(suffix))
    records, bad_rows = check(tmp_path / f"a{suffix}")
    assert len(records) == 4 and not bad_rows
