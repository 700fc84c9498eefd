"""Exact match, and the demo task that it scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.exact_match import exact_match, same_json, same_text
from examples.orders import make_orders, write_task
from qlora.errors import InputError
from qlora.records import Record, read_records


def test_what_counts_as_the_same() -> None:
    assert same_text(" a b", "a b\n") and not same_text("a b", "a  b")
    assert same_json('{"a": 1, "b": [2]}', '{"b":[2],"a":1}')
    assert not same_json('{"a": 1}', '{"a": 2}') and not same_json('{"a": 1}', "Sure! {")


def test_scores_are_of_the_last_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(_model: Any, _tokenizer: Any, conversations: Any, *_: Any, **__: Any) -> list[str]:
        seen.extend(conversations)
        return ["4", "no"]

    monkeypatch.setattr("qlora.generate.generate", fake)
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")]
    records = [
        Record({"messages": [{"role": r, "content": c} for r, c in turns]}, "a:1"),
        Record({"prompt": "3+3", "completion": "6"}, "a:2"),
    ]
    found = exact_match(None, None, records)
    assert [p.correct for p in found] == [True, False]
    assert [len(c) for c in seen] == [3, 1] and found[0].prompt == "2+2" and found[1].expected == "6"


def test_nothing_to_compare_with() -> None:
    with pytest.raises(InputError, match="no record"):
        exact_match(None, None, [])
    with pytest.raises(InputError, match="a:1 does not end with an assistant turn"):
        exact_match(None, None, [Record({"text": "just text"}, "a:1")])


def test_orders_are_seeded_unique_and_answerable(tmp_path: Path) -> None:
    assert make_orders(50, seed=1) == make_orders(50, seed=1) != make_orders(50, seed=2)
    train, test = write_task(tmp_path, num_train=300, num_test=50)
    train_prompts = {record.fields["prompt"] for record in read_records(str(train))}
    held_out = read_records(str(test))
    assert len(train_prompts) == 300 and len(held_out) == 50
    assert not train_prompts & {record.fields["prompt"] for record in held_out}
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    for record in held_out:
        meaning, text = json.loads(record.fields["completion"]), record.fields["prompt"].lower()
        assert all(meaning[field].lower() in text for field in ("name", "city", "day")) and meaning["items"]
        for entry in meaning["items"]:
            noun = f"{entry['color']} {entry['item']}{'s' if entry['count'] > 1 else ''}"
            assert any(f"{count} {noun}" in text for count in (str(entry["count"]), words[entry["count"]]))
