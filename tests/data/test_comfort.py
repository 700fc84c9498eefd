"""A run of train.py with all that data may be at once: each way of starting it ends with the same adapter."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import train
from qlora.cli.main import main as qlora_main
from qlora.data.encode import encode_prompt
from qlora.export.gguf import export_gguf
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from tests.data.test_chat_template import HERMES, PARIS, TOOLS, conversation
from tests.models import save_tiny_llama
from tests.processes import launch
from tests.shortcuts import new_cache
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

OWN_TEMPLATE = HERMES.replace("You are Qwen", "You are ours")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three sources of four shapes with a bad row each, and a template of our own."""
    folder = tmp_path_factory.mktemp("data")
    save_tiny_llama(folder / "model", tokenizer=tiny_tokenizer(), max_position_embeddings=2048)
    calls = [{"messages": conversation(PARIS), "tools": TOOLS}] * 3 + [{"messages": [], "tools": TOOLS}]
    pairs: list[Any] = [{"prompt": f"Q{i}", "completion": "A" * i} for i in range(1, 12)] + [[1]]
    tokens: list[Any] = [
        {"input_ids": list(range(5, 9 + i)), "labels": [-100, *range(6, 9 + i)]} for i in range(8)
    ]
    for name, rows in (("calls", calls), ("pairs", pairs), ("tokens", [*tokens, {"input_ids": [999]}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.jinja").write_text(OWN_TEMPLATE)
    return folder


def flags_of(folder: Path) -> list[str]:
    sources = ",".join(str(folder / f"{name}.jsonl") for name in ("calls", "pairs", "tokens"))
    flags = ["--model", str(folder / "model"), "--data", sources, "--data-weights", "2,0.5,1"]
    flags += ["--chat-template", str(folder / "own.jinja"), "--on-bad-row", "skip", "--eval-split", "0.2"]
    flags += [
        "--epochs",
        "2",
        "--eval-every",
        "3",
        "--save-every",
        "2",
        "--max-length",
        "1500",
        "--batch-size",
        "4",
    ]
    return [*flags, "--compute-dtype", "float32", "--warmup-steps", "1", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def run(folder: Path, own_cache: Path) -> Path:
    train.main([*flags_of(folder), "--output-dir", str(folder / "out")])
    return folder / "out"


def state_of(out: Path) -> list[Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    return [measured, (out / "adapter_model.safetensors").read_bytes(), (out / "bad_rows.jsonl").read_bytes()]


def test_the_run_did_what_was_asked(run: Path, folder: Path) -> None:
    # calls: 3 rows, 1 held out, twice; pairs: 11, 2 held out, half of 9; tokens: 8, 2 held out.
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in line] == [
        *range(1, 1 + 2 * -(-(2 * 2 + 4 + 6) // 4))
    ]
    bad = [json.loads(line)["where"] for line in (run / "bad_rows.jsonl").open()]
    assert bad == [f"{folder}/calls.jsonl:4", f"{folder}/pairs.jsonl:12", f"{folder}/tokens.jsonl:9"]


@pytest.mark.parametrize("options", [[], ["--no-token-cache"], ["--no-token-cache", "--num-workers", "1"]])
def test_cache_and_workers_change_nothing(
    run: Path, folder: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    train.main([*flags_of(folder), *options, "--output-dir", str(tmp_path)])
    assert state_of(tmp_path) == state_of(run)
    assert capsys.readouterr().out.count("read from the token cache") == (0 if options else 3)


@pytest.mark.parametrize("options", [[], ["--no-token-cache"]])
def test_a_resumed_run_ends_alike(run: Path, folder: Path, tmp_path: Path, options: list[str]) -> None:
    """In the second epoch, from the cache or from the files."""
    shutil.copytree(run / "checkpoints" / "step-000006", tmp_path / "checkpoints" / "step-000006")
    shutil.copy(run / "metrics.jsonl", tmp_path)
    train.main([*flags_of(folder), *options, "--output-dir", str(tmp_path), "--resume", "auto"])
    assert state_of(tmp_path) == state_of(run)
    for changed, expected in (
        (["--data-weights", "2,0.5,2"], r"data_weights was \[2.0, 0.5, 1.0\], is \[2.0, 0.5, 2.0\]"),
        (["--chat-template", str(folder / "other.jinja")], "the chat template differs"),
        (["--train-on", "all"], r"the training data \(its rows, or how they become tokens\) differs"),
    ):
        (folder / "other.jinja").write_text(HERMES)
        with pytest.raises(InputError, match=expected):
            train.main([*flags_of(folder), *changed, "--output-dir", str(tmp_path), "--resume", "auto"])


def template_of(file: Path) -> str:
    from gguf import GGUFReader

    return GGUFReader(file).fields["tokenizer.chat_template"].contents()


def test_the_template_goes_with_the_adapter(run: Path, folder: Path, tmp_path: Path) -> None:
    """Its directory, each checkpoint, the merged model, and a run that goes on with it."""
    model, question = str(folder / "model"), [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(model).chat_template == CHATML_TEMPLATE
    for directory in (run, run / "checkpoints" / "step-000006"):
        tokenizer = load_tokenizer(model, directory)
        assert tokenizer.chat_template == OWN_TEMPLATE
    qlora_main(
        ["merge", "--model", model, "--adapter", str(run), "--output-dir", str(tmp_path / "m"), "--no-drift"]
    )
    merged = load_tokenizer(str(tmp_path / "m"))
    assert merged.chat_template == OWN_TEMPLATE
    assert encode_prompt(question, merged) == encode_prompt(question, tokenizer)
    add_vocabulary = "qlora.export.gguf.add_vocabulary"  # the tiny tokenizer is none of llama.cpp's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            add_vocabulary, lambda writer, tokenizer, *_: writer.add_chat_template(tokenizer.chat_template)
        )
        export_gguf(model, tmp_path / "a.gguf", "f32", str(run))
        export_gguf(model, tmp_path / "base.gguf", "f32")
    templates = [template_of(tmp_path / name) for name in ("base.gguf", "a.gguf")]
    assert templates == [CHATML_TEMPLATE, OWN_TEMPLATE]
    more = ["--model", model, "--data", str(folder / "tokens.jsonl"), "--on-bad-row", "skip", "--max-steps", "1"]
    train.main([*more, "--adapter", str(run), "--output-dir", str(tmp_path / "more")])
    assert load_tokenizer(model, tmp_path / "more").chat_template == OWN_TEMPLATE
    other = folder / "chatml.jinja"
    other.write_text(CHATML_TEMPLATE)
    again = ["--adapter", str(run), "--chat-template", str(other), "--output-dir", str(tmp_path / "again")]
    train.main([*more, *again])
    assert load_tokenizer(model, tmp_path / "again").chat_template == CHATML_TEMPLATE


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        (b"\xff", "cannot be read"),
        ("{% for m in messages %}", "refuses it: TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0]['content'] }}", "does not write the answer 'Hello' unchanged"),
        ("{{ ''.__class__.__mro__ }}", "refuses it: SecurityError"),
    ],
)
def test_a_template_that_cannot_be_used(folder: Path, tmp_path: Path, template: Any, expected: str) -> None:
    file = tmp_path / "t.jinja"
    if template is not None:
        file.write_bytes(template if isinstance(template, bytes) else template.encode())
    flags = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--chat-template", str(file)]
    with pytest.raises(InputError, match=f"^--chat-template {file}.*({expected})"):
        train.main([*flags, "--output-dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match=expected):
        qlora_main(["check-data", str(folder / "pairs.jsonl"), *flags[:2], *flags[4:]])


def test_check_data_reads_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model",
        str(folder / "model"),
        "--chat-template",
        str(folder / "own.jinja"),
        "--max-length",
        "1500",
    ]
    with pytest.raises(InputError, match="1 of 4 rows"):
        qlora_main(["check-data", str(folder / "calls.jsonl"), *flags])
    out = capsys.readouterr().out
    assert "3 of 4 records kept" in out and "You are ours" in out and '⟦<tool_call>\n{"name": "weather"' in out
    swapped = ["--columns", "prompt=completion,completion=prompt"]
    with pytest.raises(InputError, match="1 of 12 rows"):
        qlora_main(["check-data", str(folder / "pairs.jsonl"), *flags, *swapped])
    assert "⟦Q1<|im_end|>⟧" in capsys.readouterr().out
    with pytest.raises(InputError, match="--chat-template needs a tokenizer; pass --model"):
        qlora_main(["check-data", str(folder / "pairs.jsonl"), *flags[2:4]])


@pytest.mark.slow
def test_two_processes_end_alike(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tokenizes or maps by itself; one of them writes the cache. Losses are equal to rounding."""
    flags = flags_of(folder)
    flags[flags.index("--batch-size") + 1] = "2"
    monkeypatch.setenv("QLORA_CACHE", new_cache(tmp_path / "cache"))
    done = launch(2, "train.py", *flags, "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    ours, theirs = state_of(run), state_of(tmp_path / "out")
    assert len(ours[0]) == len(theirs[0]) and ours[2] == theirs[2]
    for (step, loss, held_out), (other_step, other_loss, other_held_out) in zip(ours[0], theirs[0], strict=True):
        assert step == other_step and (loss or held_out) == pytest.approx(other_loss or other_held_out, rel=1e-4)


def test_a_run_keeps_the_date_of_its_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the next day it was refused as another run, or went on with the tokens of the day before."""
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML_TEMPLATE)
    flags = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--on-bad-row", "skip"]
    flags += ["--chat-template", str(dated), "--compute-dtype", "float32", "--no-token-cache"]
    flags += ["--output-dir", str(tmp_path / "out"), "--max-steps"]
    for day, options in ((1, ["1"]), (2, ["2", "--resume", "auto"])):
        monkeypatch.setattr("qlora.training.run.today", lambda day=day: date(2026, 3, day))
        train.main([*flags, *options])
        assert "the chat template prints the date; this run keeps 01 March 2026" in capsys.readouterr().out
