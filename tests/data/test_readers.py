"""Every kind of source gives the same records; every shape the same messages; every mistake one sentence."""

import csv
import json
import pickle
import subprocess
import sys
import tracemalloc

import pytest

from qlora.data.conversations import MAX_TEXT, to_messages
from qlora.data.readers import detect_format, read_records
from qlora.data.rows import BadRow, Record
from qlora.system.errors import InputError

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
    assert "b.json: holds {'test': [{'input'" in error_of(read_records, two_lists)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            "a.jsonl:3: not valid JSON (Expecting value at column 9, near '",
        ),
        (
            "a.jsonl",
            '{"text": "a"} {"text": "b"}\n',
            "a.jsonl:1: not valid JSON (Extra data at column 15, near 'xt",
        ),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl:2: the row is [1] (list); write an object"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "a.jsonl:2: the row is 'b' (str); write an object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            'a.jsonl:2: byte 11, 0xff after \'{"text": "\', is not valid UTF-8; save',
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "score": NaN}\n',
            "a.jsonl:2: 'score' is NaN, which is not a JSON value; write null",
        ),
        ("a.jsonl", "", "a.jsonl has no records"),
        ("a.jsonl", "\n \n", "a.jsonl has no records"),
        ("a.json", "", "a.json has no records"),
        ("a.json", "[]", "a.json has no records"),
        (
            "a.json",
            '[{"text": "a"},\n {"text" "b"}]',
            "a.json:2: not valid JSON (Expecting ':' delimiter at column 10, near",
        ),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "rename it to .jsonl if each line is an object"),
        ("a.json", '[{"text": "a"}, 3]', "a.json record 2: the row is 3 (int)"),
        ("a.json", "3", "a.json: holds 3 (int), not a list of records"),
        ("a.json", b'[{"text":\n "\xff"}]', "a.json:2: byte 3, 0xff after ' \"', is not valid UTF-8"),
        ("a.csv", "", "a.csv has no records"),
        ("a.csv", "text\n", "a.csv has no records"),
        (
            "a.csv",
            "question,answer\na,b\nc,d,e\n",
            "a.csv:3: 3 field(s) where the header has 2, the last 'e'; quote",
        ),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the header names the column 'text' twice"),
        ("a.csv", 'text\na\n"b\nc\n', "a.csv:3: not valid CSV (unexpected end of data)"),
        ("a.csv", b"text\na\na\xff\n", "a.csv:3: 'text' holds 0xff after 'a', not valid UTF-8"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a\tb"}\n',
            "a.jsonl:2: not valid JSON (Invalid control character at col",
        ),
        (
            "a.jsonl",
            '{"text": "a", "text": "b"}\n',
            "a.jsonl:1: the row has the key 'text' twice, the last one as 'b'; keep one",
        ),
        ("a.jsonl", '{"m": [{"a": 1, "b": 2, "a": 1}]}\n', "a.jsonl:1: 'm' has the key 'a' twice"),
        ("a.jsonl", '{"m": {"a": [1, [-Infinity]]}}\n', "a.jsonl:1: 'a' is -Infinity, which is not a JSON value"),
        ("a.jsonl", '{"a": ' + "[" * 10**5, "a.jsonl:1: not valid JSON (nested too deeply); write one JSON"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}\n", "a.jsonl:1: not valid JSON (Exceeds the limit (4300 digits)"),
        (
            "a.jsonl",
            '{"a": "b"}\n{"text": "cut of',
            "a.jsonl:2: not valid JSON (Unterminated string starting at col",
        ),
        (
            "a.jsonl",
            '{"a": "b"}\n{"text": "cut of',
            "(the line has no line break at its end: the file may be truncated).",
        ),
        (
            "a.jsonl",
            b'{"text": "\xc3',
            "UTF-8 (the line has no line break at its end: the file may be truncated).",
        ),
        ("a.jsonl", '{"text": "cut of\n', "write one JSON object on each line."),  # its end was not lost
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "a.jsonl: begins with the bytes ff fe, so it is UTF-16"),
        ("a.csv", "text\na\n".encode("utf-16"), "a.csv: begins with the bytes ff fe, so it is UTF-16; save"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "a.json: begins with the bytes ff fe, so it is UTF-16"),
        ("a.json", '[{"text": "a"},\n {"text": "cut of', "a.json:2: not valid JSON (Unterminated string"),
        ("a.json", '[{"text": "a"},\n {"text": "cut of', "; the file may be truncated: write it again."),
        ("a.json", '[{"text": "a"}', "; the file may be truncated: write it again."),
        ("a.json", '[{"text": "a"}, {"a": 1, "b": NaN}]', "a.json record 2: 'b' is NaN, which is not"),
        ("a.json", '[{"text": "a"}, {"a": 1, "a": 1}]', "a.json record 2: the row has the key 'a' twice"),
        ("a.json", "[" * 10**5, "a.json:1: not valid JSON (nested too deeply)"),
        (
            "a.csv",
            "a,b\n1,2\n3",
            "a.csv:3: 1 field(s) where the header has 2, the last '3'; fill it in (the line has",
        ),
        ("a.csv", "a,b\n1\n3,4\n", "a.csv:2: 1 field(s) where the header has 2, the last '1'; fill it in."),
        ("a.csv", "a,,\n1,2,3\n", "a.csv:1: the header names the column '' twice; rename one."),
        ("a.jsonl", '{"": 1, "": 2}\n', "a.jsonl:1: the row has the key '' twice, the last one as 2; keep one"),
        (
            "a.csv",
            'text\n"a',
            "check its quotes (the line has no line break at its end: the file may be truncated).",
        ),
        ("a.csv", 'text\n"a"b\n', "a.csv:2: not valid CSV (',' expected after '\"'); check its quotes."),
        ("a.csv", b"text,\xff\na,b\n", "a.csv:1: column 2 holds 0xff after '', not valid UTF-8; save"),
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
    assert "a.parquet has no records" in error_of(read_records, path)


def test_damaged_parquet(tmp_path):
    """Footer whole, pages not: pyarrow calls it an OSError, but permissions are not at fault."""
    path = tmp_path / "a.parquet"
    write_rows(path)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    assert "a.parquet: not readable as Parquet (" in error_of(read_records, str(path))


def test_parquet_with_a_column_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "text"]), path)
    assert "a.parquet: the column 'text' occurs twice; rename one." in error_of(read_records, path)


def test_parquet_with_a_text_that_is_not_utf8(tmp_path):
    import pyarrow
    import pyarrow.parquet

    buffers = pyarrow.array([b"a", b"b\xff", b"c"]).buffers()
    table = pyarrow.table({"id": [1, 2, 3], "text": pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    fields, problems = read_with_bad(tmp_path / "a.parquet")
    assert fields == [{"id": 1, "text": "a"}, {"id": 3, "text": "c"}]
    assert problems == [" row 2: 'text', byte 2, 0xff after 'b', is not valid UTF-8; save the file as UTF-8."]


def read_with_bad(path):
    bad_rows = []
    records = read_records(str(path), bad_rows=bad_rows)
    return [record.fields for record in records], [str(row).removeprefix(str(path)) for row in bad_rows]


@pytest.mark.parametrize(
    ("name", "lines", "places"),
    [
        (
            "a.jsonl",
            [
                b"[1]\n",
                b'{"text": "\xff"}\n',
                b'{"text": "a"}\n',
                b'{"text": NaN}\n',
                b"\n",
                b'{"text": "b"}\n',
                b"{",
            ],
            [":1: the row is [1]", ":2: byte 11", ":4: 'text' is NaN", ":7: not valid JSON"],
        ),
        (
            "a.json",
            [b'[3, {"text": "a"}, ', b'{"a": 1, "a": 2}, {"text": [NaN]}, ', b'{"text": "b"}, null]'],
            [" record 1: ", " record 3: ", " record 4: ", " record 6: the row is null"],
        ),
        (
            "a.csv",
            [b"text\n", b"a\n", b"\xff\n", b"1,2\n", b'"b"\n'],
            [":3: 'text' holds 0xff", ":4: 2 field(s)"],
        ),
    ],
)
def test_reading_goes_on_after_a_bad_row(tmp_path, name, lines, places):
    (tmp_path / name).write_bytes(b"".join(lines))
    fields, problems = read_with_bad(tmp_path / name)
    assert fields == [{"text": "a"}, {"text": "b"}]
    assert len(problems) == len(places)
    assert all(problem.startswith(place) for problem, place in zip(problems, places, strict=True))
    first = error_of(read_records, str(tmp_path / name))  # without a list, the first one is raised
    assert first.removeprefix(str(tmp_path / name)) == problems[0]


def test_a_file_that_is_broken_as_a_whole_is_not_skipped(tmp_path):
    for name, content in (("a.csv", 'text\na\n"b'), ("a.json", "[{"), ("a.parquet", "x"), ("a.jsonl", "")):
        with pytest.raises(InputError) as caught:
            read_records(write(tmp_path / name, content), bad_rows=[])
        assert not isinstance(caught.value, BadRow)


def test_bad_rows_cross_processes():
    row = pickle.loads(pickle.dumps(BadRow("a:1", "text is null.")))
    assert (row.where, row.problem, str(row)) == ("a:1", "text is null.", "a:1: text is null.")


def test_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_records(path)[0].fields == {"text": "a"}


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_without_an_end_is_not_read_into_memory(tmp_path, end):
    """100 MB, all of them NUL, which costs no disk; then a good row, or the end of the file."""
    path = tmp_path / "a.jsonl"
    size = 100 * 10**6
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(file.tell() + size)
        file.seek(0, 2)
        file.write(end)
        file.write(b'{"text": "b"}\n' if end else b"")
    tracemalloc.start()
    fields, problems = read_with_bad(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fields == [{"text": "a"}, {"text": "b"}][: 1 + bool(end)]
    begins = ":2: the line begins '" + '{"text": "' + "\\x00"
    assert len(problems) == 1 and problems[0].startswith(begins) and len(problems[0]) < 200
    assert f"has {size + 10 + len(end):,} bytes, more than 16,777,216; split it" in problems[0]
    assert peak < 3 * MAX_TEXT


def test_the_longest_text(tmp_path, monkeypatch):
    for module in ("conversations", "readers"):
        monkeypatch.setattr(f"qlora.data.{module}.MAX_TEXT", 64)
    line = json.dumps({"text": "x" * 52})
    assert len(line) == 64
    path = write(tmp_path / "a.jsonl", f"{line}\n{line}")
    assert len(read_records(path)) == 2
    assert ":1: the line begins" in error_of(read_records, write(tmp_path / "b.jsonl", f" {line}\n{line}"))
    longest = {"messages": [{"role": "user", "content": "x" * 64}, ASSISTANT_HELLO]}
    assert messages_of(longest)[0]["content"] == "x" * 64
    longest["messages"][0]["content"] += "x"
    assert "the content of message 1 of messages has 65 characters, more than 64, and begins 'xxx" in error_of(
        messages_of, longest
    )


def test_directory(tmp_path):
    assert "is a directory without files of one kind; name one" in error_of(read_records, str(tmp_path))


@pytest.mark.parametrize("source", ["data/train.jsonl", "train.parquet", "./train", "../a/b", "/no/such", "a/b/c"])
def test_a_missing_file_is_not_asked_of_the_hub(hub, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{source} does not exist" in error_of(read_records, source)
    assert hub.asked == []


def test_hub_offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "could be loaded from the hub" in error_of(read_records, "nobody/nothing-at-all")


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
        ("messages", {"messages": [QUESTION[0] | {"weight": 1}, QUESTION[1] | {"id": "x"}]}, QUESTION),
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
def test_every_shape_is_recognized(name, fields, expected):
    assert detect_format(fields, "here") == name
    assert messages_of(fields) == expected


def test_context_only_answers_keep_their_weight():
    muted = [QUESTION[0], QUESTION[1] | {"weight": 0}]
    assert messages_of({"messages": [*muted, *QUESTION]}) == [*muted, *QUESTION]
    assert messages_of({"prompt": [*QUESTION, QUESTION[0]], "completion": "A"}) == [*muted, *QUESTION]


@pytest.mark.parametrize(
    ("flags", "is_trained"),
    [
        ({"train": False}, False), ({"train": True}, True), ({"training": False}, False), ({"weight": 0}, False),
        ({"train": None, "training": None, "weight": None}, True), ({"weight": 1, "train": True}, True),
        ({"weight": 0, "train": False, "training": False}, False), ({"weight": 0.0}, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_flags_of_a_turn(flags, is_trained, shape):
    turns = [QUESTION[0] | {"train": False}, QUESTION[1] | flags, *QUESTION]
    answers = [turn for turn in messages_of({shape: turns}) if turn["role"] == "assistant"]
    assert [turn.get("weight") for turn in answers] == [None if is_trained else 0, None]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (QUESTION[1] | {"train": "false"}, "message 2 of messages has train 'false'; use true or false"),
        (QUESTION[1] | {"training": 1}, "message 2 of messages has training 1; use true or false"),
        (QUESTION[1] | {"weight": 1, "train": False}, "has weight and train, which disagree; keep one of them"),
        (QUESTION[1] | {"train": True, "training": False}, "has train and training, which disagree"),
        (
            {"role": "system", "content": "S", "train": True},
            "has train true, but is from the system; only the assistant's turns are trained one by one",
        ),
    ],
)
def test_bad_flags_of_a_turn(turn, expected):
    assert expected in error_of(messages_of, {"messages": [QUESTION[0], turn]})


TOKENS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}


@pytest.mark.parametrize(
    ("fields", "ids", "is_target"),
    [
        (TOKENS, [5, 6, 7], [False, True, True]),
        ({"input_ids": [5, 6]}, [5, 6], [True, True]),
        (TOKENS | {"labels": None, "attention_mask": None}, [5, 6, 7], [True] * 3),
        (TOKENS | {"attention_mask": [0, 1, 0]}, [6], [True]),  # padding on either side
    ],
)
def test_tokenized_rows(fields, ids, is_target):
    assert detect_format(fields, "here") == "tokenized"
    assert messages_of(fields) == [{"role": "tokens", "content": "", "input_ids": ids, "is_target": is_target}]
    assert messages_of(fields | {"text": "t"})[0]["role"] == "document"  # what there is to read goes first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_ids": "5 6"}, "input_ids is '5 6' (str); write a list of whole numbers"),
        ({"input_ids": [5, 6.0, 7]}, "input_ids is [5, 6.0, 7] (list)"),
        ({"input_ids": [True, 6, 7]}, "input_ids is [True, 6, 7]"),
        ({"labels": [6, 7]}, "labels has 2 numbers where input_ids has 3"),
        (
            {"labels": [6, 7, 2]},
            "labels holds 6 at index 1, where input_ids has 5; use that or -100: labels are not",
        ),
        ({"attention_mask": [0, 0, 0]}, "input_ids is empty"),
        ({"input_ids": [], "labels": [], "attention_mask": []}, "input_ids is empty"),
    ],
)
def test_bad_tokenized_rows(changes, expected):
    assert expected in error_of(messages_of, TOKENS | changes)


def mapped(tmp_path, fields, **columns):
    path = write(tmp_path / "a.jsonl", json.dumps(fields))
    return [record.fields for record in read_records(path, columns=columns)]


def test_columns_by_other_names(tmp_path):
    """What is named so wins over columns that happen to have a name of ours; what goes with it stays."""
    fields = {"q": "Q", "a": "A", "messages": QUESTION, "text": "t", "id": 1}
    assert mapped(tmp_path, fields, prompt="q", completion="a") == [{"prompt": "Q", "completion": "A"}]
    assert mapped(tmp_path, fields, text="q") == [{"text": "Q"}]
    talk = {"talk": QUESTION, "prompt": "Q", "completion": "A", "tools": [], "facts": [{"name": "f"}]}
    assert mapped(tmp_path, talk, messages="talk") == [{"messages": QUESTION, "tools": []}]
    assert mapped(tmp_path, talk, messages="talk", tools="facts")[0]["tools"] == [{"name": "f"}]
    assert mapped(tmp_path, talk, tools="facts")[0].keys() == {"prompt", "completion", "tools"}
    assert mapped(tmp_path, {"prompt": "A", "completion": "Q"}, prompt="completion", completion="prompt") == [
        {"prompt": "Q", "completion": "A"}
    ]
    swapped = {"instruction": "I", "context": "C", "reply": "R"}
    assert mapped(tmp_path, swapped, response="reply") == [{"instruction": "I", "context": "C", "response": "R"}]


def test_columns_that_are_not_there(tmp_path):
    with pytest.raises(
        BadRow, match=r"a\.jsonl:1: --columns names 'question', but the columns are \['a', 'q'\]\."
    ):
        mapped(tmp_path, {"q": "Q", "a": "A"}, prompt="question", completion="a")
    with pytest.raises(InputError, match="Unknown column 'promt' in --columns"):
        mapped(tmp_path, {"q": "Q"}, promt="q")


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
        ({"text": 3}, "text is 3 (int), not text"),
        ({"text": "ab\ud800c"}, "text holds half of a surrogate pair at character 3, in 'ab\\ud800c'; remove it"),
        ({"text": "a\0b\n"}, "text holds a NUL at character 2, in 'a\\x00b\\n'; remove it"),
        ({"text": float("nan")}, "text is nan (float), not text"),
        ({"text": "\ud800" + "x" * 1000}, "at character 1, in '\\ud800xxxxxxxxxx'; remove it"),
        ({"prompt": "Q" * 1000, "completion": ["x" * 1000] * 99}, "message 1 of completion is 'xxx"),
        ({"a\n" * 999: 1, **{str(n): 2 for n in range(999)}}, "unknown columns ['0', '1', '10', '100', '101'"),
        ({"instruction": "Q", "output": "A", "input": 0}, "input is 0 (int)"),
        ({"messages": [USER_HI, {"role": "a\n" * 999, "content": "x"}]}, "has the role 'a\\na\\na"),
        ({"messages": [USER_HI | {"content": "x\n" * 999}] * 2}, "message 2, 'x\\nx\\n"),
        ({"instruction": "Q", "output": None}, "output is null"),
        ({"instruction": None, "output": "A", "input": "x"}, "instruction is null"),
        ({"instruction": "Q", "output": "A", "input": 3}, "input is 3 (int)"),
        ({"instruction": [], "output": "A", "input": "x"}, "instruction is [] (list)"),
        ({"prompt": "Q", "completion": {"a": 1}}, "completion is {'a': 1} (dict)"),
        ({"messages": "[{'role'...}]"}, "messages is \"[{'role'...}]\" (str); write a list of messages"),
        ({"messages": ["Hi"]}, "message 1 of messages is 'Hi' (str); write a list of messages"),
        (
            {"messages": [USER_HI, {"role": "tool", "content": "3"}]},
            "message 2, '3', is from the tool, not the assistant; alternate user and assistant",
        ),
        ({"messages": [{"content": "Hi"}]}, "message 1 of messages has the role null"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1 of messages has the role ['user']"),
        (
            {"messages": [USER_HI, {"role": "assistant", "content": None}]},
            "the content of message 2 of messages is null",
        ),
        ({"messages": [USER_HI, {"role": "assistant"}]}, "the content of message 2 of messages is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "the text of a part of message 1 of messages is null",
        ),
        (
            {"messages": [USER_HI, ASSISTANT_HELLO | {"tool_calls": [{}]}]},
            "message 2 of messages has the tool_calls [{}]",
        ),
        (
            {"messages": [USER_HI, ASSISTANT_HELLO | {"weight": 0.5}]},
            "message 2 of messages has the weight 0.5; use 0 or 1",
        ),
        ({"messages": [ASSISTANT_HELLO]}, "message 1, 'Hello', is from the assistant, not the user"),
        (
            {"messages": [USER_HI, USER_HI, ASSISTANT_HELLO]},
            "message 2, 'Hi', is from the user, not the assistant",
        ),
        (
            {"messages": [USER_HI, {"role": "system", "content": "S"}, ASSISTANT_HELLO]},
            "message 2, 'S', is from the system, not the assistant",
        ),
        ({"messages": [USER_HI]}, "no assistant message to learn from"),
        ({"messages": []}, "no assistant message to learn from"),
    ],
)
def test_a_bad_record_is_named(fields, expected):
    message = error_of(messages_of, fields)
    assert message.startswith("train.jsonl:7: ") and expected in message
    assert len(message) < 500  # however long the value


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, qlora.data.readers; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
