"""Exact match, and the demo task that it scores."""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.exact_match import (
    AskConfig,
    Prediction,
    Sample,
    ask,
    exact_match,
    main,
    make_questions,
    pass_at_k,
    summarize,
)
from examples.orders import make_orders, write_task
from qlora.config.generate import Sampling
from qlora.data.answers import make_matcher
from qlora.data.readers import read_records
from qlora.data.rows import Record
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from tests import fork_server
from tests.models import save_tiny_trio
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = make_matcher()


def record(prompt: str, completion: str, origin: str = "a:1") -> Record:
    return Record({"prompt": prompt, "completion": completion}, origin)


def test_scores_are_of_the_last_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(_model: Any, _tokenizer: Any, conversations: Any, *_: Any, **__: Any) -> list[list[str]]:
        seen.extend(conversations)
        return [["4" if c[-1]["content"] == "2+2" else "no"] for c in conversations]

    monkeypatch.setattr("qlora.generation.generate_samples", fake)
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")]
    records = [
        Record({"messages": [{"role": r, "content": c} for r, c in turns]}, "a:1"),
        record("3+3", "6", "a:2"),
    ]
    found = exact_match(None, tiny_tokenizer(), records)
    assert [p.correct for p in found] == [True, False]
    assert sorted(len(c) for c in seen) == [1, 3] and found[0].prompt == "2+2" and found[1].expected == "6"


def test_nothing_to_compare_with() -> None:
    with pytest.raises(InputError, match="no record"):
        exact_match(None, None, [])
    with pytest.raises(InputError, match="a:1 does not end with an assistant turn"):
        exact_match(None, None, [Record({"text": "just text"}, "a:1")])
    with pytest.raises(InputError, match="a:1 expects 'none', in which this --match finds no answer"):
        exact_match(None, None, [record("1+1", "none")], "gsm8k")


def test_template_and_shots_make_the_conversation() -> None:
    """The system message stays in front, shots are earlier turns, and the template is for their prompts, too."""
    system = {"role": "system", "content": "Be brief."}
    shot = Record({"messages": [system, *turns("0+1", "1"), *turns("1+1", "2")]}, "s:1")
    asked = Record({"messages": [system | {"content": "Add."}, *turns("2+2", "4"), *turns("3+3", "6")]}, "a:1")
    (question,) = make_questions([asked], TEXT, "Q: {prompt} {x}", [shot])
    assert [(turn["role"], turn["content"]) for turn in question.messages] == [
        ("system", "Add."), ("user", "0+1"), ("assistant", "1"), ("user", "Q: 1+1 {x}"), ("assistant", "2"),
        ("user", "2+2"), ("assistant", "4"), ("user", "Q: 3+3 {x}"),
    ]  # fmt: skip
    assert (question.origin, question.prompt, question.expected) == ("a:1", "3+3", "6")
    same = Record({"messages": [*turns("0+1", "1"), *turns("1+1", "two")]}, "a:1")
    with pytest.raises(InputError, match="a:1 is also one of the shots"):
        make_questions([same], TEXT, shots=[shot])
    assert len(make_questions([record("1+1", "2")], TEXT, shots=[shot])) == 1  # it came after other turns there


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


# ---- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_with_a_hit(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12), (c, k)


def prediction(expected: str, *given: str | None) -> Prediction:
    samples = [Sample(text or "", text, text == expected) for text in given]
    return Prediction("?", expected, samples[0].answer, samples[0].correct, samples)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (["7", "7", "8"], True), (["8", "7", "7"], True), (["8", "8", "7"], False), (["7", "8"], True),
        (["8", "7"], False), ([None, None, "7"], True), ([None, None, "8"], False), ([None], False),
    ],
)  # fmt: skip
def test_the_majority_votes(given: list[str | None], right: bool) -> None:
    """Of a tie the first one wins; a sample without an answer has no vote."""
    assert prediction("7", *given).majority() == right


def test_sampled_scores_are_means_over_problems() -> None:
    found = [prediction("7", "7", "7", "7", "8"), prediction("7", "8", "8", "9", "7"), prediction("7", *["8"] * 4)]
    questions = make_questions([record(f"{i}?", "7", f"a:{i}") for i in range(3)], TEXT)
    config = AskConfig(samples=4, temperature=1.0, pass_at="2,4")
    scores, rows, pairing = summarize(questions, found, config, seed=0, confidence=0.95)
    values = {score.name: score.value for score in scores}
    # One of 2 samples is wrong in 0 and in 3 of the 6 pairs.
    expected = {"exact match": (3 + 1) / 12, "pass@2": (1 + 0.5) / 3, "pass@4": 2 / 3, "maj@4": 1 / 3}
    assert values == pytest.approx(expected) and list(pairing) == list(expected)
    assert [score.num_samples for score in scores] == [3] * 4
    for name, (key,) in pairing.items():
        assert sum(row[key] for row in rows) / 3 == pytest.approx(expected[name])
    assert [row["id"] for row in rows] == ["a:0", "a:1", "a:2"]


# ---- models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/ and merged/."""
    return save_tiny_trio(tmp_path_factory.mktemp("models"), tiny_tokenizer())


PROMPTS = ["Hi", "What is the capital of France?", "a b c d e f g", "Tell me more", "1 + 1?", "Why not"]
SHORT = ["--max-new-tokens", "8", "--compute-dtype", "float32"]


def plain_answers(model: Any, tokenizer: Any) -> list[str]:
    """Slow and obvious: the whole sequence again for every token, no cache and no batch."""
    from qlora.data.encode import encode_prompt

    answers = []
    for prompt in PROMPTS:
        start = encode_prompt([{"role": "user", "content": prompt}], tokenizer)
        ids = list(start)
        while len(ids) < len(start) + 8 and (ids == start or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(tokenizer.decode(ids[len(start) :], skip_special_tokens=True).strip())
    return answers


def write_rows(path: Path, answers: list[str]) -> str:
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("flags", [[], ["--no-4bit"]], ids=["4bit", "16bit"])
@pytest.mark.parametrize("which", ["base", "adapter", "merged"])
def test_base_adapter_and_merged_model_answer_for_themselves(
    models: Path, which: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the answers are those of the model at hand, computed one token at a time."""
    from qlora.adapters.load import load_adapter

    name = str(models / ("merged" if which == "merged" else "base"))
    model = load_base_model(name, use_4bit=not flags, compute_dtype="float32")
    if which == "adapter":
        load_adapter(model, models / "adapter", name)
        flags = [*flags, "--adapter", str(models / "adapter")]
    answers = plain_answers(model, load_tokenizer(name))
    assert len(set(answers)) == len(PROMPTS)
    data = write_rows(tmp_path / "data.jsonl", [a if i % 2 else f"{a} no" for i, a in enumerate(answers)])
    output = tmp_path / "out.json"
    main(["--model", name, "--data", data, "--output", str(output), "--batch-size", "4", *SHORT, *flags])
    assert "exact match 3/6 = 50.0%" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert (result["exact_match"], result["correct"], result["examples"]) == (0.5, 3, 6)
    assert [p["answer"] for p in result["predictions"]] == answers == [row["extracted"] for row in result["rows"]]
    assert [row["correct"] for row in result["rows"]] == [False, True] * 3
    (score,) = result["scores"]
    assert score["method"] == "Wilson" and 0 < score["low"] < 0.5 < score["high"] < 1


@pytest.mark.slow
def test_two_processes_equal_one(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sampled answers under torchrun: the same rows and scores, written and printed once."""
    flags = ["--model", str(models / "base"), "--data", write_rows(tmp_path / "data.jsonl", ["a"] * len(PROMPTS))]
    flags += ["--samples", "3", "--temperature", "1", "--pass-at", "2", "--batch-size", "6", *SHORT]
    main([*flags, "--output", str(tmp_path / "one.json")])
    assert capsys.readouterr().out.count("exact match 0/18") == 1
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671", "-m", "eval"]
    command = [
        sys.executable,
        *fork_server.LAUNCHER,
        "-m",
        *launcher,
        "exact_match",
        *flags,
        "--output",
        str(tmp_path / "two.json"),
    ]
    done = fork_server.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact match 0/18") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["rows"] == two["rows"] and one["scores"] == two["scores"]
    texts = [sample["answer"] for row in one["rows"] for sample in row["samples"]]
    assert len(set(texts)) == 18 and len({row["id"] for row in one["rows"]}) == 6


def test_samples_depend_on_the_seed_alone(models: Path) -> None:
    """Not on the batch, nor on how many there are."""
    model, tokenizer = (
        load_base_model(str(models / "base"), compute_dtype="float32"),
        load_tokenizer(str(models / "base")),
    )
    questions = make_questions([record(prompt, "a") for prompt in PROMPTS], TEXT)

    def draw(num_samples: int, seed: int, batch_size: int) -> list[list[str]]:
        return ask(model, tokenizer, questions, num_samples, Sampling(8, 1.0, 0.9, seed), batch_size)

    drawn = draw(3, 1, 16)
    assert drawn == draw(3, 1, 2) != draw(3, 2, 16)
    assert [texts[:2] for texts in drawn] == draw(2, 1, 16)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model and --data are required"),
        (["--samples", "3"], "All 3 samples would be equal; give --temperature"),
        (["--samples", "3", "--temperature", "1", "--pass-at", "1,5"], "pass_at holds 5; give --pass-at"),
        (["--pass-at", "one"], "pass_at is 'one'; give --pass-at numbers, such as 1,5"),
        (["--shots", "2"], "--shots and --few-shot-data go together"),
        (["--prompt-template", "hello"], r"'hello', neither a text that contains \{prompt\} nor"),
        (["--prompt-template", "{folder}/none.txt"], r"has no \{prompt\}; add it"),
        (["--shots", "9", "--few-shot-data", "{folder}/data.jsonl"], "has 6 examples; give --shots at most 6"),
        (["--shots", "1", "--few-shot-data", "{folder}/data.jsonl"], "data.jsonl:1 is also one of the shots"),
        (["--match", "json"], "data.jsonl:1 expects 'a', in which this --match finds no answer"),
        (["--match", "regex", "--pattern", "("], "not a regular expression"),
        (["--temperature", "-1"], r"temperature is -1.0; give --temperature 0 \(greedy\) or more"),
        (["--top-p", "0"], "top_p is 0.0; give --top-p"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any model is loaded."""
    data = write_rows(tmp_path / "data.jsonl", ["a"] * len(PROMPTS))
    (tmp_path / "none.txt").write_text("no place\n")
    given = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    with pytest.raises((InputError, SystemExit)) as caught:
        main([*given, *(["--model", "nowhere", "--data", data] if flags else [])])
    boxed = capsys.readouterr().err.translate({ord(line): " " for line in "│╭╮╰╯─"})
    sentence = boxed if isinstance(caught.value, SystemExit) else str(caught.value)
    assert re.search(said, " ".join(sentence.split())), sentence


# ---- the demo task ------------------------------------------------------------------------------------------


def test_orders_are_seeded_unique_and_answerable(tmp_path: Path) -> None:
    assert make_orders(50, seed=1) == make_orders(50, seed=1) != make_orders(50, seed=2)
    train, test = write_task(tmp_path, num_train=300, num_test=50)
    train_prompts = {order.fields["prompt"] for order in read_records(str(train))}
    held_out = read_records(str(test))
    assert len(train_prompts) == 300 and len(held_out) == 50
    assert not train_prompts & {order.fields["prompt"] for order in held_out}
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    for order in held_out:
        meaning, text = json.loads(order.fields["completion"]), order.fields["prompt"].lower()
        assert all(meaning[field].lower() in text for field in ("name", "city", "day")) and meaning["items"]
        for entry in meaning["items"]:
            noun = f"{entry['color']} {entry['item']}{'s' if entry['count'] > 1 else ''}"
            assert any(f"{count} {noun}" in text for count in (str(entry["count"]), words[entry["count"]]))
