"""Rows and config values that the model cannot compute are refused before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main as evaluate
from qlora.adapters.peft_files import save_adapter
from qlora.cli.commands import chat, generate
from qlora.cli.exits import run as exit_code
from qlora.config.lora import LoRAConfig
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.lora.adapter import inject_lora
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from qlora.training.run import TrainingRun
from tests.model.test_load import edit_config, small_gpt2
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a row of the embedding for each of the 269 tokens, and a tokenizer whose eos is token 269."""
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"eos_token": "<|eot|>"})
    assert tokenizer.eos_token_id == 269
    return save_tiny_llama(tmp_path_factory.mktemp("fit") / "llama", tokenizer=tokenizer, vocab_size=269)


def without_weights(model: Path, folder: Path) -> Path:
    """The same model, without its weights: reading one of them is an error of its own."""
    return Path(shutil.copytree(model, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors")))


def flags(model: Path, rows: list[dict[str, Any]], folder: Path, *more: str) -> list[str]:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"--model {model} --data {data} --output-dir {folder / 'out'} --compute-dtype float32 --max-steps 1"
    return [*text.split(), "--num-samples", "0", *more]


TYPOS = {
    "--target-modules q_prj": "match no linear layer",
    "--target-modules all-linear --layers 7": "names decoder layer 7",
    "--exclude-modules zzz": "name none of the layers to adapt",
    "--rank-pattern zz=4": "names none of the layers to adapt",
    "--modules-to-save emb": "modules_to_save names 'emb'",
    "--adapter nowhere": "The adapter directory nowhere has no adapter_config.json",
}


@pytest.mark.parametrize("typo", TYPOS)
def test_typos_are_found_before_a_weight_is_read(llama: Path, tmp_path: Path, typo: str) -> None:
    """They were told only after the base had been read, or downloaded."""
    model = without_weights(llama, tmp_path)
    job = flags(model, [{"prompt": "a", "completion": "b"}], tmp_path, *typo.split())
    with pytest.raises(InputError, match=TYPOS[typo]):
        fit(job)


@pytest.mark.parametrize("name", ["nowhere", "other"])
def test_an_adapter_is_checked_before_a_weight_is_read(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """By every command that takes one; `other` belongs to a smaller base."""
    small = load_base_model(str(save_tiny_llama(tmp_path / "small", hidden_size=32, intermediate_size=32)))
    config = LoRAConfig(rank=2)
    inject_lora(small, config)
    save_adapter(small, tmp_path / "other", config)
    job = flags(without_weights(llama, tmp_path), [{"prompt": "a", "completion": "b"}], tmp_path)
    adapter = ["--adapter", str(tmp_path / name)]
    expected = "made for another base" if name == "other" else "has no adapter_config.json"
    with pytest.raises(InputError, match=expected):
        fit([*job, *adapter])
    base = [*job[:2], *adapter]
    assert exit_code(generate.main, [*base, "--prompt", "Hi"]) == 2
    assert exit_code(evaluate, ["perplexity", *base, *job[2:4]]) == 2
    said = capsys.readouterr().err
    assert said.count(expected) == 2
    assert exit_code(chat.main, base) == 2
    assert (expected if name == "other" else "No adapter or directory is named") in capsys.readouterr().err


def test_a_target_beyond_the_vocabulary(llama: Path, tmp_path: Path) -> None:
    """The end of a document was a target one past the row of logits: the run ended with exit code 0."""
    bare = without_weights(llama, tmp_path)
    with pytest.raises(InputError, match=r"data.jsonl:1 .*'<\|eot\|>' \(id 269\).* 269 rows"):
        fit(flags(bare, [{"text": "hello"}] * 3, tmp_path))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_id_beyond_the_embedding(llama: Path, tmp_path: Path, place: int) -> None:
    ids = [5, 6, 7]
    ids[place] = 269
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": ids}]
    with pytest.raises(InputError, match=r"data.jsonl:2.*\(id 269\)"):
        fit(flags(without_weights(llama, tmp_path), rows, tmp_path, "--train-on", "all"))


def test_a_held_out_row_beyond_the_embedding(llama: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"input_ids": [5, 269, 7]}\n')
    more = ["--train-on", "all", "--eval-data", str(held_out), "--eval-every", "1"]
    with pytest.raises(InputError, match=r"held.jsonl:1.*\(id 269\)"):
        fit(flags(without_weights(llama, tmp_path), [{"input_ids": [5, 6, 7]}], tmp_path, *more))


def test_tokens_that_no_row_uses_do_not_matter(llama: Path, tmp_path: Path) -> None:
    run = fit(flags(llama, [{"input_ids": [5, 6, 268]}] * 2, tmp_path, "--train-on", "all"))
    assert run.progress.step == 1


def test_new_tokens_bring_their_rows(llama: Path, tmp_path: Path) -> None:
    """The tokens before them that had no row get one as well."""
    run = fit(flags(llama, [{"text": "hello <call>"}] * 2, tmp_path, "--new-tokens", "<call>"))
    assert run.progress.step == 1


def test_rows_longer_than_learned_positions(tmp_path: Path) -> None:
    gpt2 = small_gpt2(tmp_path / "gpt2")  # 64 positions
    tiny_tokenizer().save_pretrained(gpt2)
    (gpt2 / "model.safetensors").unlink()
    rows = [{"text": "short"}, {"text": "a long one " * 10}]
    with pytest.raises(InputError, match=r"data.jsonl:2 .* 64 positions .*--max-length 64"):
        fit(flags(gpt2, rows, tmp_path))


def test_rows_as_long_as_the_positions_train(tmp_path: Path) -> None:
    gpt2 = small_gpt2(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(gpt2)
    run = fit(
        flags(
            gpt2, [{"text": "a long one " * 10}] * 2, tmp_path, "--max-length", "64", "--target-modules", "c_attn"
        )
    )
    assert run.progress.step == 1 and max(run.examples.lengths) == 64


def test_rotary_positions_have_no_end(llama: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7] * 200}] * 2  # of 512 positions
    assert fit(flags(llama, rows, tmp_path, "--train-on", "all")).progress.step == 1


def test_an_id_beyond_the_embedding_of_a_loaded_model(llama: Path) -> None:
    """Prompts, documents to score, chats: whatever calls the model."""
    import torch

    model = load_base_model(str(llama), compute_dtype="float32", cache=False)
    for ids in ([5, 269], [-1, 5]):
        with pytest.raises(InputError, match=r"token id or position (269|-1).*269 rows"):
            model(torch.tensor([ids]))


def fit(arguments: list[str]) -> TrainingRun:
    with TrainingRun.from_config(parse_args(RunConfig, "test", arguments)) as run:
        return run.train()


VALUES = {
    "num_attention_heads": [0, 3, -4],
    "num_key_value_heads": [0, 3, 8, -2],
    "hidden_size": [0, -64],
    "head_dim": [0, 7, -16],
    "intermediate_size": [0, -1],
    "num_hidden_layers": [-1],
    "vocab_size": [0, -5],
    "rms_norm_eps": [-1.0, "x"],
    "rope_theta": [0, -1.0],
    "max_position_embeddings": [0, -1],
    "pad_token_id": [269, 10**9, -270],
    "attention_dropout": [-0.5, 1.5],
    "hidden_act": ["nonsense", 7],
    "sliding_window": [0, -3],
    "num_experts_per_tok": [0, 9],
}


@pytest.mark.parametrize("field", VALUES)
def test_values_of_the_config_out_of_their_range(llama: Path, tmp_path: Path, field: str) -> None:
    """One sentence that names config.json, and nothing about the tokenizer, which reads that file too."""
    bare = without_weights(llama, tmp_path)
    kept = (bare / "config.json").read_text()
    for value in VALUES[field]:
        (bare / "config.json").write_text(kept)
        more = {"num_experts_per_tok": {"num_local_experts": 8}, "rope_theta": {"rope_parameters": None}}
        edit_config(bare, **{field: value, **more.get(field, {})})
        with pytest.raises(InputError) as caught:
            load_tokenizer(str(bare))
            fit(flags(bare, [{"input_ids": [5, 6, 7]}], tmp_path, "--train-on", "all"))
        message = str(caught.value)
        assert "config.json" in message and field in message and "tokenizer" not in message, message
