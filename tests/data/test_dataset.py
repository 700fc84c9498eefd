"""From a source to training and held-out examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.data.dataset import find_sources
from qlora.system.errors import InputError
from tests.models import save_tiny_llama
from tests.shortcuts import load_examples
from tests.tiny import tiny_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [{"prompt": f"Question {i}", "completion": f"Answer {i}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data.jsonl")


def texts(examples: list) -> list[tuple[int, ...]]:
    return [tuple(e.input_ids.tolist()) for e in examples]


def test_the_split_is_seeded_disjoint_and_complete(source: str) -> None:
    tokenizer = tiny_tokenizer()
    whole, none = load_examples(source, tokenizer, 256, say=lambda line: None)
    assert len(whole) == 40 and none == []
    train, held = load_examples(source, tokenizer, 256, eval_split=0.1, seed=1, say=lambda line: None)
    again, _ = load_examples(source, tokenizer, 256, eval_split=0.1, seed=1, say=lambda line: None)
    other, _ = load_examples(source, tokenizer, 256, eval_split=0.1, seed=2, say=lambda line: None)
    assert (len(train), len(held)) == (36, 4)
    assert sorted(texts(train) + texts(held)) == sorted(texts(whole))
    assert texts(train) == texts(again) != texts(other)


def test_a_file_of_its_own_for_evaluation(source: str, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"text": "something held out"}\n')
    said: list[str] = []
    train, held = load_examples(
        source, tiny_tokenizer(), 256, eval_source=str(tmp_path / "eval.jsonl"), say=said.append
    )
    assert (len(train), len(held)) == (40, 1)
    assert len(said) == 2 and "eval.jsonl" in said[1]


def test_the_sample_shows_what_is_masked(source: str) -> None:
    said: list[str] = []
    load_examples(source, tiny_tokenizer(), 256, say=said.append, show_sample=True)
    assert "Question 0" in said[1] and "⟦Answer 0<|im_end|>⟧" in said[1]


def test_too_few_rows_to_split(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a single row"}\n')
    with pytest.raises(InputError, match="too few to hold some out; pass --eval-data"):
        load_examples(str(tmp_path / "one.jsonl"), tiny_tokenizer(), 256, eval_split=0.5, say=lambda line: None)


def test_a_share_that_leaves_nothing_to_train_on(source: str) -> None:
    """It said that 40 rows are too few to hold some out."""
    with pytest.raises(InputError, match="holds out all 40 examples and leaves none to train on; pass a smaller"):
        load_examples(source, tiny_tokenizer(), 256, eval_split=0.99, say=lambda line: None)


BAD_ROWS = ['{"prompt": "Q", "completion": null}\n', '{"prompt": "cut of']


@pytest.fixture
def spoilt(source: str, tmp_path: Path) -> str:
    """The rows of `source`, a bad one before them and one after: lines 1 and 42."""
    (tmp_path / "spoilt.jsonl").write_text(BAD_ROWS[0] + Path(source).read_text() + BAD_ROWS[1])
    return str(tmp_path / "spoilt.jsonl")


def test_bad_rows_are_skipped_counted_and_listed(source: str, spoilt: str, tmp_path: Path) -> None:
    listed, said = tmp_path / "bad_rows.jsonl", list[str]()
    whole, _ = load_examples(source, tiny_tokenizer(), 256, say=said.append)
    assert "bad rows skipped" not in said[0]
    options: dict[str, Any] = dict(on_bad_row="skip", bad_rows_file=listed, say=said.append)
    examples, held_out = load_examples(spoilt, tiny_tokenizer(), 256, eval_source=spoilt, **options)
    assert texts(examples) == texts(held_out) == texts(whole)
    assert [example.origin for example in examples][::39] == [f"{spoilt}:2", f"{spoilt}:41"]
    assert said[1].startswith(f"{spoilt}: 40 of 42 records kept") and "; 2 bad rows skipped)" in said[1]
    assert said[1].endswith(f"; bad rows are listed in {listed}")
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{spoilt}:1", f"{spoilt}:42"] * 2
    assert lines[0]["problem"] == "completion is null, not text; fill it in or remove the record."
    assert "the file may be truncated" in lines[1]["problem"]
    load_examples(source, tiny_tokenizer(), 256, **options)
    assert not listed.exists()  # an older list would mislead


def test_a_bad_row_stops(spoilt: str, tmp_path: Path) -> None:
    """The first one of the file: it is read and tokenized in one go."""
    said: list[str] = []
    with pytest.raises(InputError, match=f"^{spoilt}:1: completion is null"):
        load_examples(spoilt, tiny_tokenizer(), 256, say=said.append, bad_rows_file=tmp_path / "bad_rows.jsonl")
    assert said == [] and not (tmp_path / "bad_rows.jsonl").exists()
    with pytest.raises(InputError, match="on_bad_row is 'ignore'; use 'stop' or 'skip'"):
        load_examples(spoilt, tiny_tokenizer(), 256, on_bad_row="ignore")


def test_no_row_is_good(tmp_path: Path) -> None:
    """The list is there to be mended from, although there is nothing to train on."""
    data, listed = tmp_path / "data.jsonl", tmp_path / "bad_rows.jsonl"
    data.write_text("".join(BAD_ROWS))
    with pytest.raises(InputError, match=f"^All 2 records are bad; the first: {data}:1: completion is null"):
        load_examples(str(data), tiny_tokenizer(), 256, on_bad_row="skip", bad_rows_file=listed)
    assert len(listed.read_text().splitlines()) == 2


def test_special_text_is_parsed_on_demand(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "<s>", "completion": "<s>"}\n')
    for parse_special in (False, True):
        examples, _ = load_examples(
            str(tmp_path / "data.jsonl"), tiny_tokenizer(), 256, say=lambda line: None, parse_special=parse_special
        )
        assert (examples[0].input_ids == 4).sum() == 2 * parse_special


# ---- several sources ----------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> str:
    """20 rows, named with what a shell or a comma could break."""
    rows = [{"prompt": f"Other {i}", "completion": f"Reply {i} and so on"} for i in range(20)]
    (tmp_path / "b=1, x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "b=1, x.jsonl")


def load(sources: Any, **options: Any) -> tuple[Any, Any, list[str]]:
    said: list[str] = []
    return *load_examples(sources, tiny_tokenizer(), 256, say=said.append, **options), said


def test_sources_follow_one_another(source: str, other: str, tmp_path: Path) -> None:
    first, second = load(source)[0], load(other)[0]  # a name with a comma, alone
    examples, _, said = load([source, other], weights=[1, 0.5])
    assert texts(examples) == texts(first) + texts(second)
    assert [e.origin for e in examples] == [e.origin for e in first] + [e.origin for e in second]
    assert examples.sources == [(40, 1.0), (20, 0.5)] and examples.lengths == list(map(len, examples))
    assert examples.num_targets == sum(e.num_targets for e in examples)
    assert len(said) == 3
    tokens = [sum(map(len, first)), sum(map(len, second)) / 2]
    assert said[2] == (
        f"an epoch: 50 rows, {sum(tokens):,.0f} tokens; {source} x 1: 40 rows, {tokens[0]:,} tokens "
        f"({tokens[0] / sum(tokens):.0%}); {other} x 0.5: 10 rows, {tokens[1]:,.0f} tokens "
        f"({tokens[1] / sum(tokens):.0%})"
    )
    (tmp_path / "c.jsonl").write_bytes(Path(other).read_bytes())
    by_comma, _, _ = load(f"{source}, {tmp_path / 'c.jsonl'}")
    assert texts(by_comma) == texts(examples)


def test_a_pattern_names_its_files_in_order(tmp_path: Path) -> None:
    for name in ("2", "1", "[3]"):
        (tmp_path / f"shard-{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert find_sources(f"{tmp_path}/shard-?.jsonl,owner/name", [2, 1]) == [
        (f"{tmp_path}/shard-1.jsonl", 2.0), (f"{tmp_path}/shard-2.jsonl", 2.0), ("owner/name", 1.0),
    ]  # fmt: skip
    assert find_sources(f"{tmp_path}/shard-[3].jsonl") == [(f"{tmp_path}/shard-[3].jsonl", 1.0)]


@pytest.mark.parametrize(
    ("sources", "weights", "expected"),
    [
        ("a.jsonl,b.jsonl", [1.0], "data_weights has 1 numbers for 2 sources, a.jsonl, b.jsonl; give one each"),
        ("a.jsonl", [0.0], "gives a.jsonl the weight 0; give a number above 0"),
        ("a.jsonl", [-1.0], "the weight -1"), ("a.jsonl", [float("nan")], "the weight nan"),
        ("a.jsonl", [1e9], "the weight 1e.09; give a number above 0, at most 1000"),
        ("no/*.jsonl", [], "no/.*jsonl matches no file"), (" , ", [], "data is empty"),
        ("a.jsonl,b.jsonl,a.jsonl", [], "data names a.jsonl twice; give it a weight of 2 instead"),
        ("no,such.jsonl", [], "such.jsonl does not exist|could be loaded from the hub"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be(sources: str, weights: list[float], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load(sources, weights=weights)


def test_the_split_takes_its_share_of_each_source(source: str, other: str, tmp_path: Path) -> None:
    """And the same rows of a source, whatever others there are; a single row stays in training."""
    (tmp_path / "one.jsonl").write_text('{"text": "a single row"}\n')
    alone, held_alone, _ = load(source, eval_split=0.1, seed=5)
    examples, held, said = load(
        [source, other, str(tmp_path / "one.jsonl")], eval_split=0.1, seed=5, weights=[1, 2, 1]
    )
    assert texts(held)[:4] == texts(held_alone) and texts(examples)[:36] == texts(alone)
    assert examples.sources == [(36, 1.0), (18, 2.0), (1, 1.0)] and held.sources == [(4, 1.0), (2, 1.0)]
    whole = [*load(source)[0], *load(other)[0]]
    assert sorted(texts(examples)[:-1] + texts(held)) == sorted(texts(whole))
    assert "held out 6 of them for evaluation" in said


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_columns_and_bad_rows_in_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    rows = [{"q": f"Q{i}", "a": None if i == 3 else f"A{i}", "text": "t"} for i in range(300)]
    path = tmp_path / f"data{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".csv":
        path.write_text("q,a,text\n" + "".join(f"{r['q']},{r['a']},t{',x' * (r['a'] is None)}\n" for r in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    columns = {"prompt": "q", "completion": "a"}
    found = []
    for cache in (False, True, True):
        listed = tmp_path / "bad_rows.jsonl"
        examples, _, said = load(
            str(path),
            columns=columns,
            on_bad_row="skip",
            bad_rows_file=listed,
            cache=cache,
        )
        found.append((texts(examples), said[0].partition("; ")[0], listed.read_text()))
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 299
    decoded = tiny_tokenizer().decode(examples[0].input_ids.tolist())
    assert decoded == "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\nA0<|im_end|>"


@pytest.mark.slow
def test_a_run_with_workers(spoilt: str, tmp_path: Path) -> None:
    """train.py as a user starts it: the workers import it anew, and must not train."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    (tmp_path / "sitecustomize.py").write_text(
        f"import os; open({str(tmp_path / 'started')!r}, 'a').write(f'{{os.getpid()}} ')\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "train.py"), "--use-4bit", "--model", str(model), "--data", spoilt]
    command += ["--max-steps", "2", "--max-length", "128", "--on-bad-row", "skip", "--num-workers", "2"]
    command += ["--output-dir", str(tmp_path / "out")]
    environment = dict(os.environ, PYTHONPATH=f"{tmp_path}:{root}", OMP_NUM_THREADS="1")
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "40 of 42 records kept" in run.stdout and run.stdout.count("Adapter saved to") == 1
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "started").read_text().split()) >= 3  # itself and two workers
