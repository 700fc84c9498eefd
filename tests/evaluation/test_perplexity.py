"""Perplexity: against lm-eval's rolling log-likelihood, the trainer's held-out loss, and itself one at a time."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.perplexity import encode_documents, perplexity_scores, read_texts, score_documents
from qlora.data.encode import encode_records
from qlora.data.example import IGNORE_INDEX
from qlora.data.rows import Record
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from tests.lm_eval_models import instances, load_lm_eval, save_rounded_llama

WORDS = "the cat and a hen in the barn ate bread over there, then it rained.".split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rounded_llama(tmp_path_factory.mktemp("tiny") / "model")


def some_texts(count: int, longest: int = 60) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, longest))) + " é" for _ in range(count)]


def write_texts(path: Path, texts: list[str], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def run(*flags: object) -> None:
    main(["perplexity", "--compute-dtype", "float32", *map(str, flags)])


@pytest.mark.parametrize("add_bos", [False, True])
def test_documents_agree_with_lm_eval(tmp_path: Path, add_bos: bool) -> None:
    """The same file, fp32, through windows of 32 tokens: every document's log-likelihood, and lm-eval's scores."""
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    model, texts = save_rounded_llama(tmp_path / "model", add_bos=add_bos), some_texts(12)
    data = write_texts(tmp_path / "data.jsonl", texts)
    flags = ("--model", model, "--data", data, "--max-length", 32, "--no-4bit", "--output", tmp_path / "out.json")
    flags += ("--document-start", "lm-eval")
    run(*flags)
    result = json.loads((tmp_path / "out.json").read_text())
    theirs = load_lm_eval(model, 32).loglikelihood_rolling(
        instances("loglikelihood_rolling", *((t,) for t in texts))
    )
    ours = [row["log_likelihood"] for row in result["rows"]]
    assert ours == pytest.approx(theirs, abs=1e-3) and min(theirs) < -100
    assert max(row["tokens"] for row in result["rows"]) > 64 and result["num_samples"] == 12
    scores = {score["name"]: score for score in result["scores"]}
    for name, unit, metric in (
        ("perplexity per word", "words", weighted_perplexity),
        ("perplexity per byte", "bytes", weighted_perplexity),
        ("bits per byte", "bytes", bits_per_byte),
    ):
        counts = [row[unit] for row in result["rows"]]
        assert scores[name]["value"] == pytest.approx(metric(list(zip(theirs, counts, strict=True))), rel=1e-5)
        assert scores[name]["low"] < scores[name]["value"] < scores[name]["high"]
    assert [row["bytes"] for row in result["rows"]] == [len(text.encode()) for text in texts]
    assert scores["perplexity per token"]["value"] == pytest.approx(
        math.exp(-sum(ours) / sum(row["tokens"] for row in result["rows"]))
    )


@pytest.mark.slow
def test_the_real_model_agrees_with_lm_eval(dense_smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, dense in fp32: log-likelihoods of documents of some 300 tokens within 1e-3.

    lm-eval's softmax over 49,152 tokens is taken in fp64: torch's in fp32 is off by 1e-5 a token, always to the
    same side: docs/LOG.md.
    """
    dense = dense_smollm2
    texts = [
        text for text in (Path(__file__).parents[2] / "README.md").read_text().split("\n## ") if len(text) > 800
    ][:2]
    texts = [text[:1000] for text in texts]
    data = write_texts(tmp_path / "data.jsonl", texts)
    flags = ("--model", dense, "--data", data, "--max-length", 128, "--no-4bit", "--document-start", "lm-eval")
    run(*flags, "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    model = load_lm_eval(dense, 128, softmax_dtype=torch.float64)
    theirs = model.loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)))
    assert [row["log_likelihood"] for row in rows] == pytest.approx(theirs, abs=1e-3)
    assert max(row["tokens"] for row in rows) > 128


def test_packed_equals_one_document_at_a_time(directory: Path) -> None:
    model = load_base_model(str(directory), compute_dtype="float32")
    tokenizer = load_tokenizer(str(directory))
    documents = encode_documents(
        [Record({"text": text}, str(i)) for i, text in enumerate(some_texts(9))], tokenizer
    )
    for stride in (24, 7):
        packed = score_documents(model, documents, 24, stride, 500)
        single = [score_documents(model, [document], 24, stride, 1)[0] for document in documents]
        assert [p.nats for p in packed] == pytest.approx([s.nats for s in single], abs=1e-3)
        assert [p.tokens for p in packed] == [len(d.ids) - 1 for d in documents]
    few, many = (score_documents(model, documents, 24, stride, 500) for stride in (24, 7))
    assert sum(len(score.windows) for score in many) > 2 * sum(len(score.windows) for score in few)


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_conversations_have_the_trainer_s_loss(directory: Path, train_on: str) -> None:
    from accelerate import Accelerator

    from qlora.training.held_out import evaluate

    model, tokenizer = load_base_model(str(directory), compute_dtype="float32"), load_tokenizer(str(directory))
    records = [
        Record({"prompt": text, "completion": text[::-1]}, f"d:{i}") for i, text in enumerate(some_texts(8))
    ]
    documents = encode_documents(records, tokenizer, train_on)
    found = score_documents(model, documents, 2048, 2048, 4096)
    examples, report = encode_records(records, tokenizer, 2048, train_on)
    expected = evaluate(model, examples, Accelerator(), 4096)
    assert sum(s.nats for s in found) / sum(s.tokens for s in found) == pytest.approx(expected, rel=1e-5)
    assert sum(s.tokens for s in found) == report.num_targets > 100
    if train_on == "completion":
        assert [d.bytes for d in documents] == [len(r.fields["completion"].encode()) for r in records]


@pytest.mark.parametrize("add_bos", [False, True])
def test_documents_begin_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], add_bos: bool) -> None:
    """They followed BOS or EOS, which training puts before no text of such a tokenizer; or two of them."""
    from accelerate import Accelerator

    from qlora.training.held_out import evaluate

    path = save_rounded_llama(tmp_path / "model", add_bos=add_bos)
    model, tokenizer = load_base_model(str(path), compute_dtype="float32"), load_tokenizer(str(path))
    texts = [*some_texts(8), "é", "<s>the cat"]
    records = [Record({"text": text}, f"d:{i}") for i, text in enumerate(texts)]
    documents = encode_documents(records, tokenizer)
    examples, _ = encode_records(records, tokenizer, 2048)
    assert [d.ids for d in documents] == [example.input_ids.tolist() for example in examples]
    for example in examples:
        example.targets[-1] = IGNORE_INDEX  # training adds EOS at the end
    found = score_documents(model, documents, 2048, 2048, 4096)
    expected = evaluate(model, examples, Accelerator(), 4096)
    assert sum(s.nats for s in found) / sum(s.tokens for s in found) == pytest.approx(expected, rel=1e-5)
    first = 0 if add_bos else 1  # this tokenizer's first token here is one byte, unless it is a merge
    sizes = [len(text.encode()) for text in texts[:8]]
    assert all(size - 3 <= d.bytes <= size - first for size, d in zip(sizes, documents, strict=False))
    assert add_bos is (documents[0].bytes == sizes[0])
    run("--model", path, "--data", write_texts(tmp_path / "data.jsonl", texts))
    said = "begin with <s>, as in training" if add_bos else "begin with their own first token, as in training"
    assert said in capsys.readouterr().out
    run("--model", path, "--data", tmp_path / "data.jsonl", "--document-start", "lm-eval")
    assert "Documents follow <s>, as in lm-eval." in capsys.readouterr().out


def test_one_text_file_and_its_interval(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single document is drawn again by its windows; in a single window there is no interval."""
    file = tmp_path / "book.txt"
    file.write_text(" ".join(some_texts(9)))
    run("--model", directory, "--data", file, "--max-length", 64, "--output", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    (row,), score = result["rows"], result["scores"][0]
    assert score["num_samples"] == -(-row["tokens"] // 64) > 5 and score["method"] == "bootstrap of windows"
    assert score["low"] < score["value"] < score["high"]
    assert "95 % interval" in capsys.readouterr().out
    file.write_text("short")
    run("--model", directory, "--data", file, "--max-length", 64, "--output", tmp_path / "out.json")
    score = json.loads((tmp_path / "out.json").read_text())["scores"][0]
    assert (score["low"], score["high"]) == (None, None) and score["value"] > 1
    assert "—" in capsys.readouterr().out


def test_any_column_and_what_has_nothing_to_score(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path / "data.jsonl", ["the cat", "", "a hen"], column="body")
    flags = ("--model", directory, "--data", data)
    run(*flags, "--text-column", "body", "--output", tmp_path / "out.json")
    assert "1 of 3 records have nothing to score" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["id"].rpartition(":")[2] for row in rows] == ["1", "3"]
    with pytest.raises(InputError, match=r"data.jsonl:1: the column 'bdy' holds null, not text; columns .*'body'"):
        run(*flags, "--text-column", "bdy")
    with pytest.raises(InputError, match="The data has no token to score"):
        run(
            "--model",
            directory,
            "--data",
            write_texts(tmp_path / "empty.jsonl", ["", ""]),
            "--text-column",
            "text",
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "x.txt"], "--model is required"),
        (["--model", "m"], "--data is required"),
        (["--model", "m", "--data", "missing.txt"], "missing.txt cannot be read as UTF-8 text"),
        (["--model", "m", "--data", "x.txt", "--output", "no/where.json"], "--output no/where.json cannot be"),
    ],
)
def test_wrong_input(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*flags)


@pytest.mark.parametrize(
    "flags", [["--max-length", "1"], ["--stride", "-1"], ["--confidence", "95"], ["--max-examples", "-1"]]
)
def test_numbers_out_of_range(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--model", "m", "--data", "x.txt", *flags)
    assert stopped.value.code == 2 and f"give {flags[0]}" in " ".join(capsys.readouterr().err.split())


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_texts(str(tmp_path / "a.txt"))


def test_a_perplexity_beyond_floats_is_null(tmp_path: Path) -> None:
    from eval.perplexity import Document, DocumentScore
    from eval.results import write_result

    documents: Any = [Document("a", [1, 2], [True, True], 1, 1)] * 2
    scores = perplexity_scores(documents, [DocumentScore(1e4, 1, [])] * 2)
    write_result(str(tmp_path / "out.json"), "perplexity", scores, {}, [], {})
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["scores"][0]["value"] is None and result["scores"][-1]["value"] == 1e4
