"""From a source to training and held-out examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.dataset import load_examples
from qlora.errors import InputError
from tests.models import save_tiny_llama
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
    with pytest.raises(InputError, match="too few to hold any out; pass --eval-data"):
        load_examples(str(tmp_path / "one.jsonl"), tiny_tokenizer(), 256, eval_split=0.5, say=lambda line: None)


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
    assert "the file may be cut off" in lines[1]["problem"]
    load_examples(source, tiny_tokenizer(), 256, **options)
    assert not listed.exists()  # an older list would mislead


def test_a_bad_row_stops(spoilt: str, tmp_path: Path) -> None:
    """The first one of the file: it is read and tokenised in one go."""
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
    with pytest.raises(InputError, match=f"^All 2 records are bad, the first one is {data}:1: completion is null"):
        load_examples(str(data), tiny_tokenizer(), 256, on_bad_row="skip", bad_rows_file=listed)
    assert len(listed.read_text().splitlines()) == 2


def test_special_text_is_parsed_on_demand(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "<s>", "completion": "<s>"}\n')
    for parse_special in (False, True):
        examples, _ = load_examples(
            str(tmp_path / "data.jsonl"), tiny_tokenizer(), 256, say=lambda line: None, parse_special=parse_special
        )
        assert (examples[0].input_ids == 4).sum() == 2 * parse_special


@pytest.mark.slow
def test_a_run_with_workers(spoilt: str, tmp_path: Path) -> None:
    """train.py as a user starts it: the workers import it anew, and must not train."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    (tmp_path / "sitecustomize.py").write_text(
        f"import os; open({str(tmp_path / 'started')!r}, 'a').write(f'{{os.getpid()}} ')\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "train.py"), "--use-4bit", "--model", str(model), "--data", spoilt]
    command += ["--max-steps", "2", "--max-length", "128", "--on-bad-row", "skip", "--num-workers", "2"]
    command += ["--output-dir", str(tmp_path / "out")]
    environment = dict(os.environ, PYTHONPATH=f"{tmp_path}:{root}", OMP_NUM_THREADS="1")
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "40 of 42 records kept" in run.stdout and run.stdout.count("adapter in") == 1
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "started").read_text().split()) >= 3  # itself and two workers
