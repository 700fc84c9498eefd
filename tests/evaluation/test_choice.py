"""Multiple choice: layouts, prompts, and scores against lm-eval's own model on the same files."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.choice import build_context, choice_scores, choose_shots, grade, read_choice_questions, to_question
from qlora.data.rows import Record
from qlora.system.errors import InputError
from tests.lm_eval_models import evaluate_by_lm_eval, load_lm_eval, save_rounded_llama, write_choice_task
from tests.processes import launch

WORDS = "the cat and a hen in the barn ate bread over there".split()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rounded_llama(tmp_path_factory.mktemp("tiny") / "model")


def words(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(1, longest)))


def write_questions(path: Path, kind: str, count: int, seed: int = 0) -> str:
    """Questions of three choices in MMLU's ("letters"), ARC's ("text") or HellaSwag's ("continued") layout."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        texts, answer = [words(draw, 9) + "é" * draw.randrange(3) for _ in range(3)], draw.randrange(3)
        question = f"{words(draw, 20)} {number}?"
        if kind == "letters":
            rows.append({"question": question, "choices": texts, "answer": answer, "subject": "farm life"})
        elif kind == "text":
            labels = ["A", "B", "C"] if number % 2 else ["1", "2", "3"]
            choices = {"text": texts, "label": labels}
            rows.append({"question": question, "choices": choices, "answerKey": labels[answer]})
        else:
            rows.append({"ctx": question, "endings": texts, "label": str(answer)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*flags: object) -> None:
    main(["choice", "--compute-dtype", "float32", *map(str, flags)])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", ["letters", "text", "continued"])
@pytest.mark.parametrize("shots", [0, 2])
def test_scores_agree_with_lm_eval(directory: Path, tmp_path: Path, kind: str, shots: int) -> None:
    """The same files, fp32: acc, acc_norm and acc_bytes equal, each choice's log-likelihood within 1e-3."""
    data = write_questions(tmp_path / "test.jsonl", kind, 12)
    solved = write_questions(tmp_path / "train.jsonl", kind, 4, seed=1)
    flags = ("--few-shot-data", solved, "--shots", shots) if shots else ()
    out = ("--output", tmp_path / "out.json", "--max-length", 512)
    run("--model", directory, "--no-4bit", "--data", data, *flags, *out)
    ours = read(tmp_path / "out.json")
    task = write_choice_task(tmp_path, kind, data, solved, shots)
    theirs = evaluate_by_lm_eval(load_lm_eval(directory, 512), [task], tmp_path)
    for row, sample in zip(ours["rows"], theirs["samples"][task], strict=True):
        expected = [response[0] for response in sample["filtered_resps"]]
        assert row["log_likelihoods"] == pytest.approx(expected, abs=1e-3) and row["answer"] == int(
            sample["target"]
        )
    scores = {score["name"]: score["value"] for score in ours["scores"]}
    metrics = {name.split(",")[0]: value for name, value in theirs["results"][task].items()}
    assert set(scores) == ({"acc"} if kind == "letters" else {"acc", "acc_norm", "acc_bytes"})
    assert scores == pytest.approx({name: metrics[name] for name in scores}) and 0 < scores["acc"] < 1


@pytest.mark.slow
def test_the_real_model_agrees_with_lm_eval(dense_smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, dense in fp32, contexts of three shots."""
    dense = dense_smollm2
    data = write_questions(tmp_path / "test.jsonl", "text", 4)
    solved = write_questions(tmp_path / "train.jsonl", "text", 3, seed=1)
    run(
        *("--model", dense, "--no-4bit", "--data", data, "--few-shot-data", solved, "--shots", 3),
        *("--output", tmp_path / "out.json"),
    )
    task = write_choice_task(tmp_path, "text", data, solved, 3)
    theirs = evaluate_by_lm_eval(load_lm_eval(dense, 512), [task], tmp_path)
    for row, sample in zip(read(tmp_path / "out.json")["rows"], theirs["samples"][task], strict=True):
        expected = [response[0] for response in sample["filtered_resps"]]
        assert row["log_likelihoods"] == pytest.approx(expected, abs=1e-3)


def test_hendrycks_layout() -> None:
    row = {
        "question": " 1+1? ",
        "choices": ["1", "2", "3", "4"],
        "answer": "B",
        "subject": "elementary_mathematics",
    }
    question = to_question(Record(row, "a:1"))
    shot = to_question(Record({**row, "question": "2+2?", "answer": 3}, "b:1"))
    context, continuations = build_context(question, [shot], "letters")
    assert context == (
        "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
        "2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert continuations == [" A", " B", " C", " D"] and question.answer == 1
    assert build_context(question, [], "text") == ("Question: 1+1?\nAnswer:", [" 1", " 2", " 3", " 4"])


def test_hellaswag_layout_as_in_lm_eval() -> None:
    fields = {
        "ctx_a": "[header] How to bake [title] Mix.", "ctx_b": "the dough", "activity_label": "Baking",
        "endings": ["rises. [step] Wait", "falls  down"], "label": "0",
    }  # fmt: skip
    question = to_question(Record(fields, "a:1"))
    context, continuations = build_context(question, [], "text")
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    assert context == utils.preprocess("Baking: [header] How to bake [title] Mix. The dough")
    assert continuations == [" " + utils.preprocess(text) for text in fields["endings"]] and question.answer == 0


def test_bare_csv_has_its_name_for_a_subject(tmp_path: Path) -> None:
    file = tmp_path / "high_school_physics_test.csv"
    file.write_text('"What, then?",one,two,three,four,C\nWhy?,a,b,c,d,A\n')
    first, second = read_choice_questions(str(file))
    assert (first.text, first.choices, first.answer) == ("What, then?", ["one", "two", "three", "four"], 2)
    assert (first.subject, first.style, second.answer) == ("high_school_physics", "letters", 0)
    file.write_text("Why?,a,b,c,d,A\nWhy?,a,b\n")
    with pytest.raises(InputError, match=r"test.csv:2: 3 columns, but the first row has 6"):
        read_choice_questions(str(file))


def test_shots_are_of_the_subject_and_never_the_question_itself() -> None:
    def question(text: str, subject: str | None) -> Any:
        return to_question(
            Record({"question": text, "choices": ["x", "y"], "answer": 0, "subject": subject}, text)
        )

    solved = [question("1", "a"), question("2", "b"), question("3", "a"), question("4", "a")]
    assert [s.text for s in choose_shots(question("3", "a"), solved, 2)] == ["1", "4"]
    assert [s.text for s in choose_shots(question("9", None), solved, 2)] == ["1", "2"]
    with pytest.raises(InputError, match="--few-shot-data has 1 questions about 'b', fewer than --shots 2"):
        choose_shots(question("9", "b"), solved, 2)


def test_each_measure_of_likely() -> None:
    fields = {
        "question": "q",
        "choices": {"text": ["ab", "éééé", "abcdef"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    row = grade(to_question(Record(fields, "a:1")), [-3.0, -4.1, -7.0], "text")
    # per character -1.5, -1.02, -1.17; per byte -1.5, -0.51, -1.17
    assert (row["acc"], row["acc_norm"], row["acc_bytes"]) == (False, True, True)
    row = grade(to_question(Record({**fields, "answerKey": "C"}, "a:1")), [-9.0, -4.9, -7.0], "text")
    # per character -4.5, -1.225, -1.167; per byte -4.5, -0.61, -1.167
    assert (row["acc"], row["acc_norm"], row["acc_bytes"]) == (False, True, False)
    assert grade(to_question(Record(fields, "a:1")), [-3.0, -3.0, -3.0], "letters")["acc"] is False


def test_subjects_weigh_the_same_in_their_mean() -> None:
    rows = [{"acc": number < 9, "subject": "a"} for number in range(10)] + [{"acc": False, "subject": "b"}] * 2
    scores = {score.name: score for score in choice_scores(rows)}
    assert scores["acc"].value == 9 / 12 and scores["acc, mean of subjects"].value == pytest.approx(0.45)
    assert scores["acc, a"].num_samples == 10 and scores["acc, b"].value == 0
    low, high = scores["acc, mean of subjects"].low, scores["acc, mean of subjects"].high
    assert low is not None and high is not None and 0.3 < low < 0.45 < high <= 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x"}, r"no question with choices \(columns: 'text'\)"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "1 choices; give 2 to 26"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "the answer is 2; write a number from 0 to 1"),
        ({"question": "q", "choices": ["x", "y"], "answer": True}, "the answer is True"),
        ({"question": "q", "choices": ["x", "y"]}, "the answer is null"),
        ({"question": "q", "choices": ["x", 3], "answer": 0}, "an entry of choices is 3; write a text"),
        ({"question": "", "choices": ["x", "y"], "answer": 0}, "question is ''; write a text"),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"},
            "2 choices have 1 lab",
        ),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"}, "one of A, B"),
        ({"ctx": "c", "endings": ["x", "y"], "label": ""}, "the answer is ''"),
        ({"ctx": "c", "endings": "x", "label": 0}, "endings is 'x'; write a list of texts"),
        ({"question": "q", "choices": ["x", "y"], "answer": 0, "subject": 3}, "the subject is 3"),
    ],
)
def test_rows_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"a:1: .*{message}"):
        to_question(Record(fields, "a:1"))


def test_adapters_and_merged_models(directory: Path, tmp_path: Path) -> None:
    """An adapter moves the scores, and its merged model has them in 16 bits, to bf16's rounding."""
    import torch

    from qlora.adapters.peft_files import save_adapter
    from qlora.cli.main import main as qlora_main
    from qlora.config.lora import LoRAConfig
    from qlora.lora.adapter import inject_lora
    from qlora.lora.trainable import lora_parameters
    from qlora.model.load import load_base_model

    model, config = load_base_model(str(directory)), LoRAConfig()
    inject_lora(model, config, seed=1)
    torch.manual_seed(2)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter.data, std=0.3)
    save_adapter(model, tmp_path / "adapter", config, str(directory))
    data, merged = write_questions(tmp_path / "test.jsonl", "text", 6), tmp_path / "merged"
    flags = ["--model", str(directory), "--adapter", str(tmp_path / "adapter"), "--output-dir", str(merged)]
    qlora_main(["merge", *flags])
    found = []
    for place, extra in (
        (directory, ()),
        (directory, ("--adapter", tmp_path / "adapter")),
        (merged, ("--no-4bit",)),
        (directory, ("--no-4bit", "--adapter", tmp_path / "adapter")),
    ):
        run("--model", place, *extra, "--data", data, "--output", tmp_path / "out.json")
        found.append([v for row in read(tmp_path / "out.json")["rows"] for v in row["log_likelihoods"]])
    base, adapted, merge, dense = found
    assert adapted == pytest.approx(merge, rel=0.03)
    assert max(abs(a - b) for a, b in zip(base, adapted, strict=True)) > 3
    assert max(abs(a - b) for a, b in zip(dense, adapted, strict=True)) > 1


@pytest.mark.slow
def test_two_processes_equal_one(directory: Path, tmp_path: Path) -> None:
    """The same rows in the same order, to fp32 rounding; one writer, one table."""
    data = write_questions(tmp_path / "test.jsonl", "text", 9)
    for command in ("choice", "perplexity"):
        column = ["--text-column", "question"] if command == "perplexity" else []
        flags = [command, "--model", str(directory), "--compute-dtype", "float32", "--data", data, *column]
        main([*flags, "--output", str(tmp_path / "one.json")])
        result = launch(2, "-m", "eval", *flags, "--output", str(tmp_path / "two.json"))
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("95 % interval") == 1
        one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
        assert len(one["rows"]) == 9
        for a, b in zip(one["rows"] + one["scores"], two["rows"] + two["scores"], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == (pytest.approx(b[key], rel=1e-5) if isinstance(a[key], (float, list)) else b[key])


def test_contexts_that_were_cut_are_counted(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_questions(tmp_path / "test.jsonl", "continued", 6)
    run("--model", directory, "--data", data, "--max-length", 512)
    assert "their beginning was cut" not in capsys.readouterr().out
    run("--model", directory, "--data", data, "--max-length", 70)
    count = re.search(r"(\d) of 6 contexts were longer than 70 tokens; their", capsys.readouterr().out)
    assert count is not None and 0 < int(count[1]) <= 6


def test_few_shot_takes_both_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--model", "m", "--data", "d", "--shots", 3)
    assert stopped.value.code == 2 and "Few-shot needs both" in capsys.readouterr().err
