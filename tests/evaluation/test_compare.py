"""Comparing: the rows are those of separate runs, the tests those of scores.py, and unlike things are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

import eval.compare
import eval.exact_match
from eval.choice import ChoiceQuestion, grade
from eval.compare import main
from eval.pairs import compare_results
from eval.tables import make_tables, print_tables, to_markdown
from qlora.adapters.model import get_lora_model
from qlora.config.lora import LoRAConfig
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from tests.models import save_tiny_trio
from tests.tiny import tiny_tokenizer

PROMPTS = ["Hi", "What is the capital of France?", "a b c d e f g", "Tell me more", "1 + 1?", "Why not"]


def result(values: list[Any], task: str = "exact_match", **columns: list[Any]) -> dict[str, Any]:
    """A result with one item a value."""
    answers = [f"answer {i} of {value}" for i, value in enumerate(values)]
    columns = {"prompt": [f"{i}?" for i in range(len(values))], "answer": answers} | columns
    rows = [
        {"id": f"folder/data.jsonl:{i + 1}", "correct": value}
        | {name: column[i] for name, column in columns.items()}
        for i, value in enumerate(values)
    ]
    return {"task": task, "scores": [], "settings": {}, "pairing": {"exact match": ["correct"]}, "rows": rows}


# ---- models -------------------------------------------------------------------------------------------------


def test_each_model_answers_as_in_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base, two adapters (PiSSA's has a base of its own) and merged; the base is read once for the others."""
    folder = save_tiny_trio(tmp_path, tiny_tokenizer())
    base, adapter, merged = (str(folder / name) for name in ("base", "adapter", "merged"))
    pissa = str(folder / "pissa")
    trained = get_lora_model(load_base_model(base, compute_dtype="float32"), LoRAConfig(rank=4, init="pissa"))
    for parameter in trained.trainable_parameters():
        parameter.data *= 1.5
    trained.save(pissa)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": "a"}) + "\n" for p in PROMPTS))
    flags = ["--data", str(data), "--max-new-tokens", "6", "--compute-dtype", "float32", "--batch-size", "4"]
    flags += ["--match", "regex", "--pattern", "(?s)(a)"]
    expected = []
    for index, one in enumerate(
        ([], ["--adapter", pissa], ["--adapter", adapter], ["--model", merged, "--no-4bit"])
    ):
        output = str(tmp_path / f"{index}.json")
        eval.exact_match.main(["--model", base, *one, *flags, "--output", output])
        expected.append([row["answer"] for row in json.loads(Path(output).read_text())["rows"]])
    assert len({tuple(answers) for answers in expected}) == 4

    loaded: list[Any] = []
    load = eval.compare.load_evaluated
    monkeypatch.setattr(
        eval.compare, "load_evaluated", lambda config, *more: loaded.append(config) or load(config, *more)
    )
    capsys.readouterr()
    output, markdown = tmp_path / "compared.json", tmp_path / "compared.md"
    names = ["base", "pissa", "adapter", "merged"]
    main(["--model", base, "--adapter", pissa, adapter, "--merged", merged, *flags, "--output", str(output),
          "--markdown", str(markdown)])  # fmt: skip
    assert [(c.model, c.adapter, c.use_4bit) for c in loaded] == [
        (base, None, True), (base, pissa, True), (merged, None, False)
    ]  # fmt: skip
    found = json.loads(output.read_text())
    assert [entry["name"] for entry in found["compared"]] == names
    assert [[item["answers"][name] for item in found["items"]] for name in names] == expected
    assert [entry["settings"]["adapter"] for entry in found["compared"]] == [None, pissa, adapter, None]
    assert [c["models"] for c in found["comparisons"]] == [
        ["base", "pissa"], ["base", "adapter"], ["base", "merged"], ["pissa", "adapter"], ["pissa", "merged"],
        ["adapter", "merged"],
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "adapter against base" in printed and "not adjusted for 6 tests" in printed
    assert markdown.read_text().count("\n## ") == 7  # scores, tests, and 6 pairs

    # Two saved results say the same.
    main(["--results", str(tmp_path / "0.json"), str(tmp_path / "2.json"), "--output", str(output)])
    again = json.loads(output.read_text())["comparisons"][0]
    assert again == found["comparisons"][1] | {"models": ["0", "2"]}
    assert f"adapter: None, {adapter}" in " ".join(capsys.readouterr().out.split())


# ---- results ------------------------------------------------------------------------------------------------


def test_wins_losses_and_the_test_of_hits() -> None:
    """Matched by item, whatever the order of the rows and the folder of the data."""
    first = [True, False, False, True, False, False, False, True]
    second = [True, True, True, False, True, False, True, True]
    moved = result(second)
    moved["rows"] = [row | {"id": row["id"].replace("folder", "other")} for row in reversed(moved["rows"])]
    (pair,), found = compare_results(["a", "b"], [result(first), moved])
    (test,) = pair.tests
    assert pair.outcomes == {"wins": [1, 2, 4, 6], "losses": [3], "ties": [0, 5, 7]}
    assert (test.wins, test.losses, test.ties, test.difference) == (4, 1, 3, 3 / 8)
    assert test.p_value == binomtest(1, 5).pvalue and test.method.startswith("McNemar")
    assert found["comparisons"][0]["wins"] == [f"folder/data.jsonl:{i + 1}" for i in (1, 2, 4, 6)]
    assert found["items"][3] == {
        "id": "folder/data.jsonl:4", "prompt": "3?", "values": {"a": True, "b": False},
        "answers": {"a": "answer 3 of True", "b": "answer 3 of False"},
    }  # fmt: skip


def perplexities(log_likelihoods: list[float], tokens: list[int]) -> dict[str, Any]:
    columns = {"log_likelihood": log_likelihoods, "tokens": tokens, "bytes": [10, 40, 10]}
    made = result([0.0] * 3, "perplexity", **columns)
    pairing = {"log p per byte": ["log_likelihood", "bytes"], "log p per token": ["log_likelihood", "tokens"]}
    return made | {"pairing": pairing}


def test_log_likelihoods_are_compared_by_their_weights() -> None:
    a, b = perplexities([-10.0, -40.0, -9.0], [5, 9, 5]), perplexities([-8.0, -41.0, -9.0], [5, 9, 5])
    (pair,), _ = compare_results(["a", "b"], [a, b])
    assert pair.outcomes == {"wins": [0], "losses": [1], "ties": [2]}
    assert [test.name for test in pair.tests] == list(a["pairing"])
    assert [test.difference for test in pair.tests] == pytest.approx([1 / 60, 1 / 19])
    # Another tokenizer counts other tokens: only bytes can be compared.
    (pair,), _ = compare_results(["a", "b"], [a, perplexities([-8.0, -41.0, -9.0], [6, 9, 5])])
    assert [test.name for test in pair.tests] == ["log p per byte"]


def test_choices_are_shown_by_their_texts() -> None:
    """Rows as `choice` writes them."""
    question = ChoiceQuestion("mmlu.csv:1", "What barks?", ["cat", "dog"], 1, None, "letters")
    made = [
        {"task": "choice", "scores": [], "pairing": {"acc": ["acc"]}, "rows": [grade(question, nats, "letters")]}
        for nats in ([-1.0, -2.0], [-2.0, -1.0])
    ]
    pairs, found = compare_results(["a", "b"], made)
    assert pairs[0].outcomes["wins"] == [0]
    rows = make_tables(["a", "b"], pairs, found, None)[2].rows
    assert rows == [["win", "mmlu.csv:1", "What barks?", "dog", "cat", "dog"]]


def without(made: dict[str, Any], key: str) -> dict[str, Any]:
    made["rows"][1].pop(key)
    return made


def twice(made: dict[str, Any]) -> dict[str, Any]:
    return made | {"rows": made["rows"] * 2}


HITS = [True, False]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (result(HITS, "choice"), "can be compared, but a is of exact_match, b is of choice"),
        (result([True]), r"1 of the 2 items of a are not in b \(the first is data.jsonl:2\)"),
        (result([True] * 3), r"1 of the 3 items of b are not in a \(the first is data.jsonl:3\)"),
        (result(HITS, prompt=["0?", "2?"]), "The prompt of data.jsonl:2 differs between a and b"),
        (result(HITS, expected=["1", "2"]), "The expected of data.jsonl:1 differs"),
        (result(HITS) | {"pairing": {"accuracy": ["correct"]}}, "a and b have no score in common"),
        (without(result(HITS), "correct"), "b has a row without id or score"),
        (without(result(HITS), "id"), "b has a row without id or score"),
        (twice(result(HITS)), "b has the item data.jsonl:1 twice"),
        (result(HITS) | {"rows": [None]}, "b has a row without id or score"),
    ],
)
def test_what_is_unlike_is_refused(other: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare_results(["a", "b"], [result(HITS), other])


def test_markdown_keeps_each_row_on_one_line() -> None:
    a, b = result(HITS, answer=["x|y", "1\n2"]), result([False, True], answer=["z" * 500, ""])
    pairs, found = compare_results(["a", "b"], [a, b])
    text = to_markdown(make_tables(["a", "b"], pairs, found, None))
    assert "| win | data.jsonl:2 | 1? |  | 1 2 |  |" in text
    assert rf"| loss | data.jsonl:1 | 0? |  | x\|y | {'z' * 500} |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert len(make_tables(["a", "b"], pairs, found, 0)) == 2


def test_the_screen_shows_items_one_below_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Long answers are cut, and what looks like markup is text."""
    a, b = result(HITS, answer=["[bold]x[/]", "1\n2"]), result([False, False], answer=["z" * 500, ""])
    print_tables(make_tables(["a", "[b]"], *compare_results(["a", "[b]"], [a, b]), 1))
    printed = capsys.readouterr().out
    assert "[b] against a: 0 wins, 1 losses, 1 ties" in printed and "[bold]x[/]" in printed and "1 2" in printed
    assert printed.count("z") == 297 and "..." in printed


def test_samples_are_shown_by_how_many_are_right() -> None:
    samples = [[{"answer": "1", "correct": True}, {"answer": "2", "correct": False}]] * 2
    _, found = compare_results(["a", "b"], [result(HITS, samples=samples), result(HITS)])
    assert found["items"][0]["answers"]["a"] == "1 of 2 right, the first: answer 0 of True"


# ---- flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Nothing to compare; pass --model with --adapter or --merged, or two --results"),
        (["--model", "m"], "Nothing to compare"),
        (["--adapter", "a", "b"], "--adapter needs its base; pass --model"),
        (["--model", "m", "--adapter", "a"], "--data is required"),
        (["--model", "m", "--adapter", "a", "a/"], "a/? is given twice"),
        (["--results", "a.json", "b.json"], "a.json is not readable JSON"),
        (["--results", "{folder}/a.json", "{folder}/c.json"], "c.json is not the result of an evaluation"),
        (["--results", "{folder}/a.json", "{folder}/d.json"], "d.json is not the result of an evaluation"),
        (["--results", "{folder}/a.json", "{folder}/b.json"], "1 of the 2 items of a are not in b"),
        (["--results", "{folder}/a.json", "{folder}/a.json"], "a.json is given twice"),
        (["--results", "a", "b", "--markdown", "{folder}"], "--markdown .* cannot be written"),
        (["--results", "a", "b", "--show", "-1"], "show is -1; give --show 0 or more"),
    ],
)
def test_wrong_input_is_one_sentence(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result(HITS)))
    (tmp_path / "b.json").write_text(json.dumps(result([True])))
    (tmp_path / "c.json").write_text(json.dumps({"exact_match": 0.5}))
    (tmp_path / "d.json").write_text(json.dumps(result(HITS) | {"scores": [{"name": "exact match"}]}))
    with pytest.raises((InputError, SystemExit)) as caught:
        main([flag.replace("{folder}", str(tmp_path)) for flag in flags])
    boxed = capsys.readouterr().err.translate({ord(line): " " for line in "│╭╮╰╯─"})
    sentence = boxed if isinstance(caught.value, SystemExit) else str(caught.value)
    assert re.search(said, " ".join(sentence.split())), sentence
