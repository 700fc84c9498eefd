"""Every kind of source gives the same records; every shape the same messages; every mistake one sentence."""

import csv
import json
import subprocess
import sys

import pytest

from qlora.errors import InputError
from qlora.records import Record, detect_format, read_records, to_messages

ROWS = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "Übersetze, bitte:", "input": 'a "quoted"\nline', "output": "é, 😀\u2028."},
]
USER_HI = {"role": "user", "content": "Hi"}
ASSISTANT_HELLO = {"role": "assistant", "content": "Hello"}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_rows(path):
    """ROWS in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        write(path, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")
    elif path.suffix == ".json":
        write(path, json.dumps(ROWS))
    elif path.suffix == ".csv":
        with open(
            path, "w", newline="", encoding="utf-8-sig"
        ) as file:  # with a byte order mark, as Excel writes it
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


def error_of(function, *args):
    """The one sentence that the call raises: it must be one line and end in a full stop."""
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def messages_of(fields):
    return to_messages(Record(fields, "train.jsonl:7"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, suffix):
    path = write_rows(tmp_path / f"train{suffix}")
    records = read_records(path)
    assert [record.fields for record in records] == ROWS
    second_origin = {".json": " record 2", ".jsonl": ":3", ".csv": ":3", ".parquet": " row 2"}[suffix]
    assert records[1].origin == path + second_origin


def test_csv_origin_is_the_line_where_the_row_begins(tmp_path):
    path = write(tmp_path / "a.csv", 'question,answer\n"two\nlines",b\n\nc,d\n')
    assert [record.origin for record in read_records(path)] == [f"{path}:2", f"{path}:5"]


def test_csv_field_longer_than_the_default_limit(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "text\n" + "x" * (limit + 1) + "\n")
    assert len(read_records(path)[0].fields["text"]) == limit + 1
    assert csv.field_size_limit() == limit  # put back


def test_json_object_with_one_list_field(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))
    assert [record.fields for record in read_records(path)] == ROWS
    two_lists = write(tmp_path / "b.json", json.dumps({"train": ROWS, "test": ROWS}))
    assert "b.json: no list of records" in error_of(read_records, two_lists)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "a.jsonl:3: not valid JSON (Expecting value"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}\n', "a.jsonl:1: not valid JSON (Extra data: column 15)"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl:2: got list"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "a.jsonl:2: got str"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2, byte 11: not valid UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "score": NaN}\n', "a.jsonl:2: not valid JSON (NaN"),
        ("a.jsonl", "", "a.jsonl holds no records"),
        ("a.jsonl", "\n \n", "a.jsonl holds no records"),
        ("a.json", "", "a.json holds no records"),
        ("a.json", "[]", "a.json holds no records"),
        (
            "a.json",
            '[{"text": "a"},\n {"text" "b"}]',
            "a.json: not valid JSON (Expecting ':' delimiter: line 2",
        ),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "name it .jsonl if each line is an object"),
        ("a.json", '[{"text": "a"}, 3]', "a.json record 2: got int"),
        ("a.json", "3", "a.json: no list of records"),
        ("a.json", b'[{"text":\n "\xff"}]', "a.json:2, byte 3: not valid UTF-8"),
        ("a.csv", "", "a.csv holds no records"),
        ("a.csv", "text\n", "a.csv holds no records"),
        ("a.csv", "question,answer\na,b\nc,d,e\n", "a.csv:3: 3 fields where the header has 2"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the header ['text', 'text'] names a column twice"),
        ("a.csv", 'text\na\n"b\nc\n', "a.csv:3: not valid CSV (unexpected end of data)"),
        ("a.csv", b"text\na\n\xff\n", "a.csv:3, byte 1: not valid UTF-8"),
        ("a.parquet", "text", "a.parquet: not readable as Parquet"),
        ("a.txt", "text", "a.txt ends in '.txt'; use .json, .jsonl, .csv or .parquet"),
        ("train", "text", "train ends in ''"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, expected):
    assert expected in error_of(read_records, write(tmp_path / name, content))


def test_empty_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "a.parquet holds no records" in error_of(read_records, path)


def test_directory(tmp_path):
    assert "is a directory; name one" in error_of(read_records, str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset answers from a dict, and the calls are kept."""
    import datasets

    calls, known = [], {"owner/name": ROWS}

    def load_dataset(name, split):
        calls.append((name, split))
        if name not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub.")
        return datasets.Dataset.from_list(known[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("source", ["data/train.jsonl", "train.parquet", "./train", "../a/b", "/no/such", "a/b/c"])
def test_a_missing_file_is_not_asked_of_the_hub(hub, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{source} does not exist" in error_of(read_records, source)
    assert hub == []


def test_hub(hub):
    records = read_records("owner/name", split="train[:2]")
    assert [record.fields for record in records] == ROWS
    assert records[1].origin == "owner/name row 2"
    message = error_of(read_records, "nobody/nothing")
    assert "'nobody/nothing' is no file here" in message and "doesn't exist on the Hub" in message
    assert hub == [("owner/name", "train[:2]"), ("nobody/nothing", "train")]


def test_hub_offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "could not be loaded from the hub" in error_of(read_records, "nobody/nothing-at-all")


QUESTION = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TALK = [{"role": "system", "content": "S"}, *QUESTION, {"role": "user", "content": "Q2"}]
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("messages", {"messages": QUESTION}, QUESTION),
        ("messages", {"messages": TALK}, TALK[:3]),  # the trailing question has no target
        ("messages", {"messages": [{"role": "developer", "content": "S"}, *QUESTION]}, TALK[:3]),
        ("messages", {"messages": [*QUESTION, *QUESTION]}, [*QUESTION, *QUESTION]),
        ("messages", {"prompt": "Q", "text": "t", "messages": QUESTION}, QUESTION),
        ("messages", {"messages": [QUESTION[0] | {"weight": 1}, QUESTION[1] | {"name": "x"}]}, QUESTION),
        ("sharegpt", {"conversations": SHAREGPT}, TALK[:3]),
        ("sharegpt", {"conversations": QUESTION}, QUESTION),
        ("alpaca", {"instruction": "Q", "output": "A"}, QUESTION),
        ("alpaca", {"instruction": "Q", "input": "", "output": "A", "text": "t"}, QUESTION),
        ("alpaca", {"instruction": "Q", "input": None, "output": "A"}, QUESTION),
        (
            "alpaca",
            {"instruction": "Q", "input": "x", "output": "A"},
            [{"role": "user", "content": "Q\n\nx"}, QUESTION[1]],
        ),
        (
            "alpaca",
            {"instruction": "Q", "context": "x", "response": "A", "category": "c"},
            [{"role": "user", "content": "Q\n\nx"}, QUESTION[1]],
        ),
        ("prompt_completion", {"prompt": "Q", "completion": "A"}, QUESTION),
        ("prompt_completion", {"prompt": "Q", "response": "A"}, QUESTION),
        ("prompt_completion", {"prompt": QUESTION[:1], "completion": QUESTION[1:]}, QUESTION),
        ("prompt_completion", {"prompt": TALK[:2], "completion": "A"}, TALK[:3]),
        ("question_answer", {"question": "Q", "answer": "A"}, QUESTION),
        ("question_answer", {"messages": None, "question": "Q", "answer": "A", "text": None}, QUESTION),
        ("text", {"text": "once", "meta": 3}, [{"role": "document", "content": "once"}]),
        ("text", {"prompt": "Q", "text": "once"}, [{"role": "document", "content": "once"}]),
    ],
)
def test_every_shape_is_recognised(name, fields, expected):
    assert detect_format(fields, "here") == name
    assert messages_of(fields) == expected


def test_context_only_answers_keep_their_weight():
    muted = [QUESTION[0], QUESTION[1] | {"weight": 0}]
    assert messages_of({"messages": [*muted, *QUESTION]}) == [*muted, *QUESTION]
    assert messages_of({"prompt": [*QUESTION, QUESTION[0]], "completion": "A"}) == [*muted, *QUESTION]


def test_the_record_is_not_changed():
    fields = {"prompt": [*QUESTION, QUESTION[0]], "completion": [dict(QUESTION[1])]}
    before = json.dumps(fields)
    messages_of(fields)
    assert json.dumps(fields) == before


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"foo": 1, "bar": 2},
            "unknown columns ['bar', 'foo']; rename them to one of: messages; conversations; inst",
        ),
        ({}, "unknown columns []"),
        ({"text": None}, "text is null, not text"),
        ({"text": 3}, "text is int, not text"),
        ({"text": "a\ud800"}, "text holds half of a surrogate pair"),
        ({"instruction": "Q", "output": None}, "output is null"),
        ({"instruction": None, "output": "A", "input": "x"}, "instruction is null"),
        ({"instruction": "Q", "output": "A", "input": 3}, "input is int"),
        ({"instruction": [], "output": "A", "input": "x"}, "instruction is list"),
        ({"prompt": "Q", "completion": {"a": 1}}, "completion is dict"),
        ({"messages": "[{'role'...}]"}, "messages must be a list of messages"),
        ({"messages": ["Hi"]}, "messages must be a list of messages"),
        (
            {"messages": [USER_HI, {"role": "tool", "content": "3"}]},
            "message 2 has the role 'tool'; use system, ",
        ),
        ({"messages": [{"content": "Hi"}]}, "message 1 has the role 'None'"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1 has the role '['user']'"),
        ({"messages": [USER_HI, {"role": "assistant", "content": None}]}, "the content of message 2 is null"),
        ({"messages": [USER_HI, {"role": "assistant"}]}, "the content of message 2 is null"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "the content of message 1 is list"),
        ({"messages": [USER_HI, ASSISTANT_HELLO | {"tool_calls": [{}]}]}, "message 2 calls a tool"),
        (
            {"messages": [USER_HI, ASSISTANT_HELLO | {"weight": 0.5}]},
            "message 2 has the weight 0.5; use 0 or 1",
        ),
        ({"messages": [ASSISTANT_HELLO]}, "message 1 is from the assistant, not the user"),
        ({"messages": [USER_HI, USER_HI, ASSISTANT_HELLO]}, "message 2 is from the user, not the assistant"),
        (
            {"messages": [USER_HI, {"role": "system", "content": "S"}, ASSISTANT_HELLO]},
            "message 2 is from the system, not the assistant",
        ),
        ({"messages": [USER_HI]}, "nothing to learn without an assistant message"),
        ({"messages": []}, "nothing to learn without an assistant message"),
    ],
)
def test_a_bad_record_is_named(fields, expected):
    message = error_of(messages_of, fields)
    assert message.startswith("train.jsonl:7: ") and expected in message


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, qlora.records; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
