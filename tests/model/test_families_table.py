"""The table of families against transformers' modules, and a family added to it by one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora.export.gguf import export_gguf
from qlora.model.block import fuse_blocks, is_fused
from qlora.model.families import FAMILIES, ROWS, Family, GGUFForm, gguf_forms
from qlora.model.gguf_source import GGUFSource
from qlora.model.skeleton import matrix_layers
from qlora.parallel.divisibility import check_widths, possible_counts
from qlora.planning.memory import layer_bytes
from qlora.system.errors import InputError
from tests.model.test_block import make_model, outputs
from tests.models import tiny_llama_config
from tests.parity.test_families import FAMILIES as EXERCISED
from tests.parity.test_families import GPT2_SIZES, SIZES
from tests.reference import relative_error
from tests.shortcuts import plan_memory
from tests.tiny import tiny_tokenizer

# Ministral's block is Mistral's, with a window of each layer's own.
ROW = Family("ministral", "MinistralDecoderLayer", True, gguf=GGUFForm("mistral3", "interleaved"))
LAYERS = {"sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]}
DIVISIBLE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "head_dim": 64,
}


def exercised_config(name: str) -> Any:
    kind, settings = EXERCISED[name]
    sizes = GPT2_SIZES if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")
    return config(**{**sizes, **settings})


CONFIGS = {config.model_type: config for config in map(exercised_config, reversed(EXERCISED))}


def test_every_family_is_exercised() -> None:
    assert FAMILIES.keys() <= CONFIGS.keys() and len(FAMILIES) == len(ROWS)


@pytest.mark.parametrize("family", ROWS, ids=lambda family: family.model_type)
def test_row_describes_the_modules(family: Family) -> None:
    """What a row says of blocks, norms, biases, experts and names is so in transformers' modules."""
    from gguf import MODEL_ARCH_NAMES

    config = CONFIGS[family.model_type]
    with torch.device("meta"):
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type])(config)
    blocks = {type(module).__name__ for module in model.modules()}
    names = {name for name, _ in model.named_parameters()}
    last = {name.rpartition(".")[2] for name in matrix_layers(model)}
    assert family.block is None or family.block in blocks
    assert not family.tensor_parallel or family.block
    assert family.head_norms == any(".q_norm." in name for name in names)
    assert family.post_norms == any(".post_feedforward_layernorm." in name for name in names)
    assert family.gated_experts == any(p.dim() == 3 for p in model.parameters())
    assert last.issuperset(family.qkv)
    assert family.gated_experts or last.issuperset(family.mlp_in + family.mlp_out)
    assert all(any(name.endswith(f"{layer}.weight") for name in names) for layer in family.embedding)
    assert all(any(ours in f"{name}." for name in names) for ours, _ in family.file_names[:1])
    if family.torchtune_rotary:
        assert family.qkv_bias == any(name.endswith("q_proj.bias") for name in names)
    assert family.gguf is None or family.gguf.architecture in MODEL_ARCH_NAMES.values()


def test_families_of_one_architecture_agree() -> None:
    assert all(gguf_forms()[f.gguf.architecture] == f.gguf for f in ROWS if f.gguf)


# ---- a family more ----------------------------------------------------------------------------------------


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ministral" not in FAMILIES
    monkeypatch.setitem(FAMILIES, "ministral", ROW)


def ministral(**settings: Any) -> Any:
    return make_model("Ministral", model_type="ministral", **LAYERS, **settings)  # LLaMA's config has its own


def test_without_its_row_nothing_is_done(tmp_path: Path) -> None:
    model = ministral(**DIVISIBLE)
    fuse_blocks(model)
    assert not any(map(is_fused, model.model.layers)) and possible_counts(model.config) == []
    with pytest.raises(InputError, match="of the kind ministral"):
        check_widths(model.config, 2)
    save(model, tmp_path / "model")
    with pytest.raises(InputError, match="is a ministral model"):
        export_gguf(str(tmp_path / "model"), tmp_path / "model.gguf")


@pytest.mark.parametrize("packed", [True, False])
def test_blocks_are_fused(packed: bool, added: None) -> None:
    """Values and the gradient of every parameter, within the tolerance of test_block.py."""
    plain, fused = ministral(), ministral()
    fuse_blocks(fused)
    assert all(map(is_fused, fused.model.layers)) and not any(map(is_fused, plain.model.layers))
    (hidden, gradients), (expected, others) = outputs(fused, packed), outputs(plain, packed)
    assert relative_error(hidden, expected) < 1e-5
    assert gradients.keys() == others.keys() and len(gradients) > 18
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) < 5e-5, name


def test_it_is_planned(added: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LLaMA of the same sizes, whose block it has; with norms of the heads if the row says so."""
    plans = []
    for model in (ministral(), make_model("Llama")):
        fuse_blocks(model)
        plans.append(plan_memory(model, 96, torch.float32))
    assert plans[0] == plans[1]
    config = ministral().config
    before = layer_bytes(config, torch.float32)
    monkeypatch.setitem(FAMILIES, "ministral", Family("ministral", head_norms=True, post_norms=True))
    assert layer_bytes(config, torch.float32) > before


def test_it_is_divided(added: None) -> None:
    config = ministral(**DIVISIBLE).config
    assert possible_counts(config) == possible_counts(tiny_llama_config(**DIVISIBLE)) == [2]
    check_widths(config, 2)


def save(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def test_it_is_written_and_read_as_gguf(added: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every weight comes back bit for bit, q and k in another order in between."""
    from gguf import GGUFReader

    model, file = ministral(), tmp_path / "model.gguf"
    save(model, tmp_path / "model")
    export_gguf(str(tmp_path / "model"), file, "f32", pre_tokenizer="gpt-2")
    source, expected = GGUFSource(file), dict(model.named_parameters())
    assert source.names == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(source.read(name), parameter.detach()), name
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}
    weight = expected["model.layers.0.self_attn.q_proj.weight"].detach()
    assert not torch.equal(stored["blk.0.attn_q.weight"], weight)
    assert torch.equal(stored["blk.0.attn_q.weight"].sort(dim=0).values, weight.sort(dim=0).values)
    monkeypatch.delitem(FAMILIES, "ministral")
    with pytest.raises(InputError, match="holds a mistral3 model"):
        GGUFSource(file)
