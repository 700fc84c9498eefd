"""Models and datasets by hub id, through huggingface_hub and datasets themselves, from a hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora.data.readers import read_records
from qlora.model.load import load_base_model
from qlora.model.resolve import resolve_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from tests.loopback_hub import LoopbackHub
from tests.models import save_tiny_llama
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

IDS = torch.arange(3, 30)[None]


@torch.no_grad()
def logits(model: str) -> torch.Tensor:
    return load_base_model(model, use_4bit=False, compute_dtype="float32")(IDS).logits


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_model(hub: LoopbackHub, tmp_path: Path, max_shard_size: str) -> None:
    """The same model as from its directory, in one file and in several; its tokenizer and templates too."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML_TEMPLATE, "tool_use": "{# tools #}" + CHATML_TEMPLATE}
    local = save_tiny_llama(tmp_path / "local", tokenizer=tokenizer, max_shard_size=max_shard_size)
    assert (len(list(local.glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    (local / "pytorch_model.bin").write_bytes(b"a pickle")
    (local / "original").mkdir()
    (local / "original" / "consolidated.safetensors").write_bytes(b"a second copy")
    name = f"someone/tiny-{max_shard_size}"
    hub.add(name, local)
    assert torch.equal(logits(name), logits(str(local)))
    assert load_tokenizer(name).chat_template == tokenizer.chat_template
    fetched = {
        path.rpartition("/resolve/")[2].partition("/")[2] for method, path, _ in hub.asked if method == "GET"
    }
    assert not fetched & {"pytorch_model.bin", "original/consolidated.safetensors"}


def test_config_alone_needs_no_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("someone/planned", save_tiny_llama(tmp_path / "local", tokenizer=tiny_tokenizer()))
    assert not list(resolve_model("someone/planned", weights=False).glob("*.safetensors"))
    assert list(resolve_model("someone/planned").glob("*.safetensors"))


def test_cut_download_is_resumed(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last whole chunk before the connection broke, and complete at the end."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    local = save_tiny_llama(tmp_path / "local", tokenizer=tiny_tokenizer())
    hub.add("someone/cut", local)
    hub.cut = {"model.safetensors"}
    weights = local / "model.safetensors"
    assert (resolve_model("someone/cut") / "model.safetensors").read_bytes() == weights.read_bytes()
    asked = [part for method, path, part in hub.asked if method == "GET" and path.endswith("model.safetensors")]
    assert asked == [None, f"bytes={weights.stat().st_size // 2 // 1000 * 1000}-"]


def test_private_model(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the token in HF_TOKEN; without it, one sentence."""
    hub.add("someone/private", save_tiny_llama(tmp_path / "local", tokenizer=tiny_tokenizer()))
    hub.private = {"someone/private"}
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 34)
    with pytest.raises(InputError, match=r"--model someone/private is neither a local path nor a model the hub"):
        resolve_model("someone/private")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (resolve_model("someone/private") / "config.json").is_file()


def test_dataset(hub: LoopbackHub, tmp_path: Path) -> None:
    """The rows of a JSONL file on the hub; a slice; a name that is not there."""
    rows = [{"instruction": f"Say {number}", "input": "", "output": str(number)} for number in range(5)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.add("someone/rows", tmp_path / "rows", kind="datasets")
    records = read_records("someone/rows")
    assert [record.fields for record in records] == rows and records[1].origin == "someone/rows row 2"
    assert [record.fields for record in read_records("someone/rows", split="train[:2]")] == rows[:2]
    with pytest.raises(InputError, match="No file 'someone/absent' exists, and no such dataset"):
        read_records("someone/absent")


@pytest.mark.parametrize("last", ["x", "7"])
def test_csv_dataset(hub: LoopbackHub, tmp_path: Path, last: str) -> None:
    """Texts as in the file: pandas read NA, None and null as null, so that such an input was left out."""
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "train.csv"
    answers = ["007", "1.50", "true", last]
    inputs = ["NA", "None", "null", ""]
    lines = [f"Do it,{given},{answer}" for given, answer in zip(inputs, answers, strict=True)]
    path.write_text("\n".join(["instruction,input,output", *lines]) + "\n")
    repo = f"someone/csv-{last}"
    hub.add(repo, tmp_path / "rows", kind="datasets")
    expected = [record.fields for record in read_records(str(path))]
    assert [record.fields for record in read_records(repo)] == expected
    assert [row["output"] for row in expected] == answers and [row["input"] for row in expected] == inputs


def test_private_dataset(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "one"}\n')
    hub.add("someone/secrets", tmp_path / "rows", kind="datasets")
    hub.private = {"someone/secrets"}
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 34)
    with pytest.raises(InputError, match="no such dataset"):
        read_records("someone/secrets")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert [record.fields for record in read_records("someone/secrets")] == [{"text": "one"}]
