"""Rows of preferences: each known shape gives the rows written out by hand, and everything else is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.sorted_keys import write_task
from qlora.data.batches import collate_packed, collate_padded, split_batch
from qlora.data.dataset import Encoder, Sources, load_examples
from qlora.data.encode import encode_records
from qlora.data.example import IGNORE_INDEX, EncodeReport, Example, format_sample
from qlora.data.keys import describe_notes
from qlora.data.prompts import prompt_of
from qlora.data.python_rows import PythonRows
from qlora.data.rows import BadRow, Record
from qlora.data.token_cache import digests_of
from qlora.system.errors import InputError
from tests.shortcuts import encode_example
from tests.tiny import tiny_tokenizer

LONG = 1000
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "No"))
)
FIRST = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]


def encode(rows: list[Any], kind: Any = "pairs", max_length: int = LONG, **options: Any) -> Any:
    records = [Record(row, f"a:{number}") for number, row in enumerate(rows, start=1)]
    return encode_records(records, tiny_tokenizer(), max_length, kind=kind, **options)


def expected(turns: list[dict[str, Any]], max_length: int = LONG) -> Example:
    """The last answer of a conversation, as supervised fine-tuning trains it."""
    return encode_example(turns, tiny_tokenizer(), max_length, train_on="last")


def same(one: Example, other: Example) -> bool:
    return torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)


PLAIN = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("row", "before"),
    [
        (PLAIN, []),
        ({"question": "Hi", "chosen": "Hello", "rejected": "No", "system": "Be kind"}, [SYSTEM]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, []),
        ({"prompt": [*FIRST, USER], "chosen": [GOOD], "rejected": "No"}, FIRST),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No", "history": [["Who?", "Me"]]}, FIRST),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, []),
        ({"chosen": [SYSTEM, *FIRST, USER, GOOD], "rejected": [SYSTEM, *FIRST, USER, BAD]}, [SYSTEM, *FIRST]),
        ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"}, []),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
                "system": "Be kind",
            },
            [SYSTEM],
        ),
        ({"messages": [*FIRST, USER], "chosen": GOOD, "rejected": "No"}, FIRST),
    ],
)
def test_a_pair_is_the_two_rows_of_its_answers(row: dict[str, Any], before: list[Any]) -> None:
    examples, report = encode([row])
    chosen, rejected = examples[0].sequences
    assert same(chosen, expected([*before, USER, GOOD])) and same(rejected, expected([*before, USER, BAD]))
    assert not report.notes and examples[0].split == len(chosen) and examples[0].origin == "a:1"
    assert (report.num_tokens, report.num_targets) == (len(examples[0]), examples[0].num_targets)


def test_instruction_and_input_are_one_prompt() -> None:
    examples, _ = encode([{"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "12"}])
    asked = {"role": "user", "content": "Add\n\n1 2"}
    assert same(examples[0].sequences[0], expected([asked, {"role": "assistant", "content": "3"}]))


def test_every_turn_after_the_common_prefix_is_trained() -> None:
    """An answer in the prefix is context, though the row that stands alone would train it."""
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    examples, _ = encode([{"chosen": [*FIRST, USER, GOOD, *more], "rejected": [*FIRST, USER, BAD]}])
    muted = [FIRST[0], FIRST[1] | {"weight": 0}, USER, GOOD, *more]
    assert same(examples[0].sequences[0], encode_example(muted, tiny_tokenizer(), LONG))


def test_columns_beside_a_pair_are_named() -> None:
    row = PLAIN | {"messages": [USER, GOOD], "score": 0.5, "label": True}
    whole = {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0}
    _, report = encode([row, whole])
    assert list(report.notes) == ["columns not used"]
    assert sorted(report.notes["columns not used"]) == ["label", "messages", "prompt", "score", "score_chosen"]


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "pairs", "or pass --objective sft"),
        ({"prompt": "Hi", "completion": "Hello", "label": True}, "pairs", "or pass --objective kto"),
        (PLAIN, "labels", "or pass --objective dpo"),
        ({"messages": [USER, GOOD]}, "labels", "label (true or false), but the columns are ['messages']"),
        (PLAIN, "answers", "pass --objective dpo to learn from pairs"),
        (
            {"prompt": "Hi", "completion": "No", "label": False},
            "answers",
            "pass --objective kto, or keep the rows",
        ),
        (
            {"prompt": "Hi", "completion": "No", "label": "bad"},
            "labels",
            "label is 'bad' (str); write true or false",
        ),
        (PLAIN | {"rejected": None}, "pairs", "rejected is null; write an answer as text"),
        (PLAIN | {"rejected": "a\0"}, "pairs", "with its rejected answer: completion holds a NUL"),
        (PLAIN | {"images": ["a.png"]}, "pairs", "the column 'images' is not text"),
        ({"chosen": "Hello", "rejected": "No"}, "pairs", "chosen is an answer without its prompt; add a column"),
        ({"chosen": [USER, GOOD], "rejected": [*FIRST, USER, BAD]}, "pairs", "begin differently"),
        (
            {"conversations": "Hi", "chosen": "a", "rejected": "b"},
            "pairs",
            "conversations is 'Hi' (str); write a list",
        ),
    ],
)
def test_other_rows_are_refused_in_one_sentence(row: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(BadRow) as error:
        encode([row], kind)
    assert words in str(error.value), error.value


def test_pairs_without_a_difference_are_dropped_counted_and_named() -> None:
    rows = [
        PLAIN,
        PLAIN | {"rejected": "Hello"},
        PLAIN | {"chosen": "Hello the cat", "rejected": "Hello the dog"},
        PLAIN | {"rejected": ""},
        {"prompt": "Hi" * 50, "chosen": "a", "rejected": "b"},
    ]
    examples, report = encode(rows, max_length=len(expected([USER, GOOD])))
    assert [example.origin for example in examples] == ["a:1", "a:4"]
    assert (report.num_dropped_equal, report.num_dropped_no_target, report.num_records) == (2, 1, 5)
    assert "2 of 5 records kept" in str(report) and "1 without a target, 2 with equal answers)" in str(report)
    assert describe_notes(report.notes) == [
        "pairs dropped, whose answers are equal: in the data (1 row), within --max-length (1 row)",
        "nothing to learn in: answers (1 row)",
    ]
    with pytest.raises(InputError, match="1 with equal answers"):
        encode([PLAIN | {"rejected": "Hello"}])
    _, dropped = encode([PLAIN, PLAIN | {"chosen": "Hello" * 20}], max_length=40, on_long="drop")
    assert (dropped.num_dropped_long, dropped.num_records) == (1, 2)


def labelled(prompt: str, answer: str, label: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, "label": label}


def test_a_labelled_row_has_the_answer_of_another_prompt_beside_its_own() -> None:
    """The last row before it with another prompt gives it; the first rows take the first one after them."""
    rows = [
        labelled("A", "a"),
        labelled("A", "aa", False),
        labelled("B", "b"),
        labelled("B", "bb"),
        labelled("C", "c"),
    ]
    others = ["b", "b", "aa", "aa", "bb"]
    examples, report = encode(rows, "labels")
    assert [example.is_wanted for example in examples] == [True, False, True, True, True]
    for row, other, example in zip(rows, others, examples, strict=True):
        own = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        first, second = example.sequences
        assert same(first, expected(own)) and same(second, expected([own[0], own[1] | {"content": other}]))
    assert report.num_records == 5
    with pytest.raises(InputError, match="All 2 rows have the same prompt"):
        encode(rows[:2], "labels")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*FIRST, USER, GOOD], "label": False},
        {"conversations": [*FIRST, USER, GOOD], "kto_tag": False},
        {"prompt": [*FIRST, USER], "completion": [GOOD], "label": False},
        {"instruction": "Hi", "output": "Hello", "history": [["Who?", "Me"]], "kto_tag": False},
    ],
)
def test_the_last_answer_alone_has_the_label(row: dict[str, Any]) -> None:
    examples, report = encode([row, labelled("x", "y")], "labels")
    assert same(examples[0].sequences[0], expected([*FIRST, USER, GOOD])) and not examples[0].is_wanted
    assert not report.notes


def test_another_answer_is_cut_at_max_length() -> None:
    examples, _ = encode([labelled("Hi" * 9, "a"), labelled("B", "b" * 99)], "labels", max_length=40)
    assert [len(part) for example in examples for part in example.sequences][1:3] == [40, 40]


def test_columns_are_renamed_and_rows_cached(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs and single answers of one source are cached apart, and read again with split and label."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    rows = [{"prompt": f"Q{n}", "good": "Yes", "bad": "No"} for n in range(4)]
    source = PythonRows("rows", rows)
    columns = {"prompt": "prompt", "chosen": "good", "rejected": "bad"}
    found = []
    for _ in range(2):
        encoder = Encoder(tiny_tokenizer(), LONG, columns=columns, cache=True, kind="pairs")
        examples, held = load_examples(Sources([source], split=0.5), encoder, say=lambda line: None)
        assert len(held) == 2
        found.append([(e.split, e.is_wanted, e.input_ids.tolist()) for e in (*examples, *held)])
    assert found[0] == found[1] and all(split for split, _, _ in found[0])
    with pytest.raises(InputError, match="Unknown column 'chosen' in --columns"):
        load_examples(Sources([source]), Encoder(tiny_tokenizer(), LONG, columns=columns), say=lambda line: None)


def test_a_label_is_part_of_the_data() -> None:
    one, other = (encode([labelled("A", "a", label), labelled("B", "b")], "labels")[0] for label in (True, False))
    assert digests_of(one)[0] != digests_of(other)[0] and digests_of(one)[1] == digests_of(other)[1]


def test_a_pair_stays_together_in_a_batch_and_its_sequences_apart() -> None:
    examples, _ = encode([PLAIN | {"prompt": "Hi" * n} for n in range(1, 6)])
    packed, padded = collate_packed(examples), collate_padded(examples)
    parts = [part for example in examples for part in example.sequences]
    assert packed.cu_seqlens is not None and packed.cu_seqlens.diff().tolist() == [len(part) for part in parts]
    assert packed.max_length == max(map(len, parts)) and packed.num_tokens == sum(map(len, examples))
    assert packed.position_ids[0, : len(examples[0])].tolist() == [
        place for part in examples[0].sequences for place in range(len(part))
    ]
    assert padded.input_ids.shape == (10, max(map(len, parts)))
    for row, part in zip(padded.targets, parts, strict=True):
        assert torch.equal(row[: len(part)], part.targets) and (row[len(part) :] == IGNORE_INDEX).all()
    small = split_batch(packed, 1)
    assert [len(batch.examples) for batch in small] == [1] * 5 and all(len(b.sequences) == 2 for b in small)


def test_a_pair_is_shown_and_asked_by_its_chosen_answer() -> None:
    examples, _ = encode([PLAIN])
    assert format_sample(examples[0], tiny_tokenizer()).count("⟦") == 4  # twice in each head line and answer
    assert prompt_of(examples[0], tiny_tokenizer()).expected == "Hello"
    bad = encode([labelled("A", "a", False), labelled("B", "b")], "labels")[0]
    assert [prompt_of(example, tiny_tokenizer()).expected for example in bad] == [None, "b"]
    assert str(EncodeReport()) == str(EncodeReport(num_dropped_equal=0))


def test_the_example_s_preference_is_not_in_its_answers(tmp_path: Path) -> None:
    """Answers for SFT come in any of six orders; chosen ones are sorted; what is held out is not trained."""
    write_task(tmp_path)
    rows = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.iterdir()}

    def keys(text: str) -> list[str]:
        return list(json.loads(text))

    assert {name: len(lines) for name, lines in rows.items()} == {
        "sft": 320, "pairs": 160, "labels": 160, "test": 100, "test_pairs": 100, "test_labels": 100,
    }  # fmt: skip
    num_sorted = sum(keys(row["completion"]) == sorted(keys(row["completion"])) for row in rows["sft"])
    assert 35 < num_sorted < 75  # a sixth
    for row in rows["pairs"] + rows["test_pairs"]:
        chosen, rejected = json.loads(row["chosen"]), json.loads(row["rejected"])
        assert chosen == rejected and list(chosen) == sorted(chosen) != list(rejected)
        assert sorted(row["prompt"].split(", ")) == [f"{key} {value}" for key, value in chosen.items()]
    trained, held_out = (
        {frozenset(json.loads(row["completion"]).items()) for row in rows[name]} for name in ("sft", "test")
    )
    assert len(trained) == 320 and len(held_out) == 100 and not trained & held_out
