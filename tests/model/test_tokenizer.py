"""A LLaMA whose tokenizer is tokenizer.model alone: training and evaluation begin with BOS, as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import qlora.model.tokenizer
from qlora.data.chat_template import bos_ids
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    return tmp_path


@pytest.mark.parametrize(
    ("declared", "is_ours"),
    [
        (None, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "GemmaTokenizer"}, False),
    ],
)
def test_bos_is_added_where_nothing_says_otherwise(
    directory: Path, monkeypatch: pytest.MonkeyPatch, declared: dict[str, Any] | None, is_ours: bool
) -> None:
    made: list[Any] = []
    if declared is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(declared))
    monkeypatch.setattr(qlora.model.tokenizer, "find_spec", lambda name: name)
    for kind in (transformers.LlamaTokenizer, transformers.AutoTokenizer):
        name = kind.__name__
        monkeypatch.setattr(kind, "from_pretrained", lambda path, name=name, **kw: made.append((name, kw)))
    load_tokenizer(str(directory))
    assert len(made) == 1 and (made[0][0] == "LlamaTokenizer") is is_ours
    assert (made[0][1].get("add_bos_token") is True) is is_ours


def test_a_missing_package_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora.model.tokenizer, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="takes sentencepiece to read; pip install sentencepiece"):
        load_tokenizer(str(directory))


def test_the_real_tokenizer_begins_with_bos(directory: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    sentences = ["hello world this is a test"] * 20 + ["abc def ghi jkl"] * 20
    options = {"vocab_size": 60, "model_type": "bpe", "unk_id": 0, "bos_id": 1, "eos_id": 2, "minloglevel": 2}
    with (directory / "tokenizer.model").open("wb") as file:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=file, **options)
    tokenizer = load_tokenizer(str(directory))
    assert bos_ids(tokenizer) == [1] and tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids)[1][0] == "▁"
