"""From a source to training and held-out examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.dataset import load_examples
from qlora.errors import InputError
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
