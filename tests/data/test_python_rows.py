"""Rows from Python are read as the same rows in a file: same values, same errors, a digest for the cache."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict

from qlora.data.dataset import find_sources
from qlora.data.python_rows import PythonRows, take_sources
from qlora.data.readers import identify_source, read_records
from qlora.data.rows import BadRow, sort_by_place
from qlora.system.errors import InputError
from tests.shortcuts import load_examples
from tests.tiny import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1", "weight": 1}]},
    {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}]},
    {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "3"}]},
]
PAIRS = [{"prompt": f"{n} + 1", "completion": str(n + 1), "extra": None} for n in range(5)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", [list, tuple, pandas.DataFrame, Dataset.from_list])
@pytest.mark.parametrize("rows", [ROWS, PAIRS])
def test_every_kind_gives_the_rows_of_the_file(tmp_path: Path, kind: Any, rows: list[Any]) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    found = read_records(PythonRows("data", kind(rows)))
    assert [record.origin for record in found] == [f"data[{number}]" for number in range(len(rows))]
    fields = [record.fields for record in found]
    if kind != Dataset.from_list:  # which has a key of any row in all of them
        assert fields == [record.fields for record in read_records(path)]
    examples, _ = load_examples([PythonRows("data", kind(rows))], tiny_tokenizer(), 64, say=lambda _: None)
    expected, _ = load_examples(path, tiny_tokenizer(), 64, say=lambda _: None)
    assert examples.digests.tolist() == expected.digests.tolist() and len(examples) == len(rows)


def test_a_dataset_is_read_in_its_own_values_whatever_its_format() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    dataset = Dataset.from_list([row | {"note": "x"} for row in rows])
    for given in (
        dataset.with_format("numpy"),
        dataset.with_format("torch", columns=["input_ids", "labels"]),
        dataset.with_transform(lambda batch: {name: batch[name] for name in ("input_ids", "labels")}),
    ):
        fields = [record.fields for record in read_records(PythonRows("data", given))]
        assert [{name: row[name] for name in ("input_ids", "labels")} for row in fields] == rows


def test_a_cell_without_a_value_is_null_and_numpy_s_values_are_python_s() -> None:
    frame = pandas.DataFrame(
        {
            "prompt": ["a", None, "c"],
            "completion": ["1", "2", np.nan],
            "day": [pandas.NaT, pandas.Timestamp(2026, 1, 1), pandas.NaT],
            "input_ids": [np.array([1, 2]), None, np.array([3])],
        }
    )
    fields = [record.fields for record in read_records(PythonRows("data", frame))]
    assert [row["prompt"] for row in fields] == ["a", None, "c"]
    assert [row["completion"] for row in fields] == ["1", "2", None]
    assert [row["input_ids"] for row in fields] == [[1, 2], None, [3]]
    assert fields[0]["day"] is None and fields[1]["day"] == datetime.datetime(2026, 1, 1)
    plain = read_records(PythonRows("data", [{"input_ids": (np.int64(3), 4)}]))[0].fields
    assert plain == {"input_ids": [3, 4]} and type(plain["input_ids"][0]) is int


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("oops", "data[1]: the row is 'oops' (str); write an object"),
        (None, "data[1]: the row is null; write an object"),
        ({1: "x"}, "data[1]: the key 1 (int) is not text; name every column by a text."),
        ({"messages": [{2: "x"}]}, "data[1]: the key 2 (int) is not text"),
        ({"text": float("nan")}, "data[1]: 'text' is NaN, which is not a JSON value"),
        ({"text": LOOP}, "data[1]: the row is nested too deeply."),
    ],
)
def test_a_bad_row_is_named_by_its_place_as_in_python(row: Any, problem: str) -> None:
    rows = [{"text": "fine"}, row, {"text": "fine"}]
    with pytest.raises(BadRow) as raised:
        read_records(PythonRows("data", rows))
    assert str(raised.value).startswith(problem)
    bad: list[BadRow] = []
    assert len(read_records(PythonRows("data", rows), bad_rows=bad)) == 2 and len(bad) == 1


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (7, "data is of type int; give a path, a list of dicts, a pandas DataFrame or a datasets.Dataset."),
        ((row for row in PAIRS), "data is of type generator; give a path"),
        ({"prompt": "a"}, "data is of type dict, with 'prompt'; give one split or [row]."),
        (
            DatasetDict(train=Dataset.from_list(PAIRS)),
            "data is of type DatasetDict, with 'train'; give one split",
        ),
        (Dataset.from_list(PAIRS).to_iterable_dataset(), "data is of type IterableDataset; give a path"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "data: the column 'a' occurs twice; rename one."),
        (["a.jsonl", {"prompt": "a"}], "data[1] is of type dict, with 'prompt'; give one split or [row]."),
        ([PAIRS, 7], "data[1] is of type int; give a path"),
    ],
)
def test_what_is_no_source_is_told(data: Any, problem: str) -> None:
    with pytest.raises(InputError) as raised:
        take_sources("data", data)
    assert str(raised.value).startswith(problem)


def test_sources_of_all_kinds_stand_in_one_list(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, ROWS)
    given = [PAIRS, path, Dataset.from_list(PAIRS), pandas.DataFrame(PAIRS)]
    sources = take_sources("data", given)
    assert [str(source) for source in sources] == ["data[0]", str(path), "data[2]", "data[3]"]
    assert [weight for _, weight in find_sources(sources, [1, 2, 3, 0.5])] == [1, 2, 3, 0.5]
    examples, _ = load_examples(sources, tiny_tokenizer(), 64, say=lambda _: None)
    assert [rows for rows, _ in examples.sources] == [5, 3, 5, 5] and examples[5].origin == f"{path}:1"
    assert examples[0].origin == "data[0][0]" and examples[17].origin == "data[3][4]"
    with pytest.raises(InputError, match="for 2 sources, data\\[0\\], data\\[1\\]"):
        find_sources(take_sources("data", [PAIRS, PAIRS]), [1])


@pytest.mark.parametrize("kind", [list, pandas.DataFrame, Dataset.from_list])
def test_the_identity_is_the_content_s(kind: Any) -> None:
    first, again = (identify_source(PythonRows("data", kind(PAIRS))) for _ in range(2))
    changed = [*PAIRS[:-1], PAIRS[-1] | {"completion": "6!"}]
    others = [
        PythonRows("data", kind(changed)),
        PythonRows("data", kind(PAIRS[::-1])),
        PythonRows("other", kind(PAIRS)),  # whose places have another name
    ]
    assert first == again and first is not None
    assert all(identify_source(other) != first for other in others)


def test_what_has_no_digest_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    said: list[str] = []
    odd = [row | {"extra": object()} for row in PAIRS]
    dated = [row | {"extra": datetime.date(2026, 1, 1)} for row in PAIRS]
    assert identify_source(PythonRows("data", odd)) is None
    for rows in (odd, odd, dated, dated):
        load_examples([PythonRows("data", rows)], tiny_tokenizer(), 64, say=said.append, cache=True)
    cached = [("read from the token cache" in line) for line in said if "kept" in line]
    assert cached == [False, False, False, True]
    assert len([path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]) == 1


def test_bad_rows_come_in_the_order_of_the_data() -> None:
    bad = [BadRow(f"data[{number}]", "x") for number in (10, 9, 2)]
    sort_by_place(bad)
    assert [row.where for row in bad] == ["data[2]", "data[9]", "data[10]"]


def test_neither_pandas_nor_datasets_is_imported_for_a_list() -> None:
    code = (
        "import sys; from qlora.data.python_rows import PythonRows\n"
        "assert list(PythonRows('data', [{'text': 'a'}]).stream())\n"
        "sys.exit(any(name in sys.modules for name in ('pandas', 'datasets', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
