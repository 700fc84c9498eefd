"""Merged weights against the plain formula, an ordinary directory, the drift, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlora.export.merge
import qlora.export.merged_weights
import qlora.export.mixture
import qlora.model.shards
from qlora.adapters.model import get_lora_model
from qlora.cli import main as command_line
from qlora.cli.exits import run
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.export.drift import Drift, compare_logits, load_drift_texts, perplexity
from qlora.export.merge import merge_adapter
from qlora.model.base import base_info
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.library import Params4bit
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import WEIGHTS
from tests import fork_server, reference
from tests.models import save_tiny_llama, tiny_llama_config
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5
BF16_ROUNDING = 2**-8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer=tiny_tokenizer())


def make_adapter(base: Path, directory: Path, quant: QuantConfig | None = QuantConfig(), **settings: Any) -> Path:  # noqa: B008
    """An adapter with random A and B, as after training."""
    network = load_base_model(str(base), quant is not None, quant, compute_dtype="float32", cache=False)
    config = LoRAConfig(**{"rank": 4, "alpha": 6.0, **settings})
    model = get_lora_model(network, config, base_name=str(base))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.lora_parameters():
        parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    model.save(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(
        llama, tmp_path_factory.mktemp("adapters") / "adapter", target_modules="q_proj,v_proj,up_proj"
    )


def merge(model: Path, adapter: Path, output: Path, **options: Any) -> Drift | None:
    adapters = [str(adapter), *map(str, options.pop("others", []))]
    say = options.pop("say", print)
    return merge_adapter(str(model), adapters, str(output), MergeOptions(**{"drift": False, **options}), say)


def merged_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every weights file, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        loaded = load_file(file)
        assert not tensors.keys() & loaded.keys()
        tensors.update(loaded)
    assert tensors
    return tensors


def plain_merge(base: Path, adapter: Path, quant: QuantConfig | None) -> dict[str, Tensor]:
    """fp32 dequant(W) + (alpha / rank) B A for each stored tensor, written out."""
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    state = load_file(adapter / WEIGHTS)
    description = json.loads((adapter / "adapter_config.json").read_text())
    for name, weight in weights.items():
        if quant is not None and name.endswith("_proj.weight"):
            codes, quant_state = quantize_4bit(
                weight, blocksize=64, compress_statistics=quant.double_quant, quant_type=quant.quant_type
            )
            weights[name] = reference.dequantize(SimpleNamespace(data=codes, quant_state=quant_state))
    layers = {key.rpartition(".lora_")[0] for key in state if ".lora_" in key}
    for key in state.keys() - {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}:
        weights[key.removeprefix("base_model.model.")] = state[key].float()
    for layer in layers:
        A, B = (state[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        name = layer.removeprefix("base_model.model.") + ".weight"
        weights[name] = weights[name] + description["lora_alpha"] / description["r"] * (B @ A)
    assert layers
    return weights


def assert_rounded(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each tensor is the expected one in bf16; a sum on the edge between two bf16 numbers may fall either way."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype is torch.bfloat16
        rounded = expected[name].to(torch.bfloat16)
        assert (tensor == rounded).float().mean() > 0.999, name
        assert ((tensor.float() - expected[name]).abs() <= BF16_ROUNDING * expected[name].abs() + 1e-7).all(), name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def load_merged(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def everything_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quant", [QuantConfig(), QuantConfig("fp4"), QuantConfig(double_quant=False), None], ids=str
)
def test_merged_weights(llama: Path, tmp_path: Path, quant: QuantConfig | None) -> None:
    """bf16(dequantized + s B A), for the quantization that the adapter's file names; None is a 16-bit base."""
    adapter = make_adapter(llama, tmp_path / "adapter", quant, target_modules="all-linear")
    merge(llama, adapter, tmp_path / "merged")
    assert_rounded(merged_tensors(tmp_path / "merged"), plain_merge(llama, adapter, quant))


def test_merging_onto_the_original(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """bf16(W + s B A), W as it was before quantization: another model than the default's."""
    merge(llama, adapter, tmp_path / "original", base="original")
    original = merged_tensors(tmp_path / "original")
    assert_rounded(original, plain_merge(llama, adapter, None))
    merge(llama, adapter, tmp_path / "dequantized")
    name = "model.layers.0.mlp.gate_proj.weight"
    difference = relative_error(merged_tensors(tmp_path / "dequantized")[name].float(), original[name].float())
    assert 0.05 < difference < 0.15  # NF4's error on Gaussian weights is 0.09


def test_merged_model_computes_what_the_adapter_does(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """transformers' own model on the saved weights against base + adapter: bf16 rounding of the weights apart."""
    from qlora.adapters.load import load_adapter

    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    plain = logits(network)
    load_adapter(network, adapter)
    expected = logits(network)
    merge(llama, adapter, tmp_path / "merged")
    assert relative_error(logits(load_merged(tmp_path / "merged")), expected) < 5 * BF16_ROUNDING
    assert relative_error(plain, expected) > 0.1


def foreign_adapter(base: Path, directory: Path, quant: QuantConfig | None = None, name: str = "") -> Path:
    """An adapter as other tools save it: without a word on the bits of its base."""
    adapter = make_adapter(base, directory, quant)
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS)  # drops our metadata
    if name:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    return adapter


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("", "auto", None),
        ("", "dequantized", QuantConfig()),
        ("", "original", None),
        ("someone/llama-3-8b-bnb-4bit", "auto", QuantConfig()),
        ("someone/llama-3-8b-bnb-4bit", "original", None),
        ("someone/llama-4bits-of-wisdom", "auto", None),
    ],
)
def test_base_of_another_tools_adapter(
    llama: Path, tmp_path: Path, name: str, base: str, expected: QuantConfig | None
) -> None:
    """The name of its base tells; otherwise 16 bits are assumed, and that is said once."""
    adapter = foreign_adapter(llama, tmp_path / "adapter", name=name)
    said: list[str] = []
    merge(llama, adapter, tmp_path / "merged", base=base, say=said.append)
    assert_rounded(merged_tensors(tmp_path / "merged"), plain_merge(llama, adapter, expected))
    is_assumed = base == "auto" and expected is None
    assert [("--base dequantized" in line) for line in said] == [True] * is_assumed


def test_drift_from_both_bases(llama: Path, tmp_path: Path) -> None:
    """Where the base is assumed, the drift from the other is measured too, and is that of the other's adapter."""
    said: list[str] = []
    adapter = foreign_adapter(llama, tmp_path / "adapter")
    drift = merge(llama, adapter, tmp_path / "merged", drift=True, say=said.append)
    own = make_adapter(llama, tmp_path / "own")  # the same values, recorded as trained on NF4
    other = merge(llama, own, tmp_path / "other", base="original", drift=True)
    assert drift is not None and other is not None and drift.mean_kl < other.mean_kl / 100
    assert said[-1] == f"Drift if the base was NF4 in training: {other}"


def test_stored_bits_of_the_base_tell(llama: Path, prequantized: Path, tmp_path: Path) -> None:
    adapter = foreign_adapter(llama, tmp_path / "adapter")
    said: list[str] = []
    merge(prequantized, adapter, tmp_path / "merged", say=said.append)
    assert_rounded(merged_tensors(tmp_path / "merged"), plain_merge(llama, adapter, QuantConfig()))
    assert not said


def test_the_known_base_of_others(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter that does not tell goes with one that does."""
    foreign = foreign_adapter(llama, tmp_path / "foreign")
    for adapters in ([foreign, adapter], [adapter, foreign]):
        mixture = qlora.export.mixture.read_mixture(list(map(str, adapters)))
        assert (mixture.quantization, mixture.is_base_known) == (QuantConfig(), True)


@pytest.fixture(scope="module")
def prequantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a bitsandbytes checkpoint of transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    directory = tmp_path_factory.mktemp("models") / "prequantized"
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = AutoModelForCausalLM.from_pretrained(llama, quantization_config=options, dtype=torch.float32)
    source.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_prequantized_base(llama: Path, adapter: Path, prequantized: Path, tmp_path: Path) -> None:
    """A bitsandbytes checkpoint merges to the same weights, and nothing of its quantization stays."""
    merge(prequantized, adapter, tmp_path / "merged")
    assert_rounded(merged_tensors(tmp_path / "merged"), plain_merge(llama, adapter, QuantConfig()))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("target", ["attn.c_proj", "c_attn", "c_fc"])
def test_gpt2(tmp_path: Path, target: str) -> None:
    """Conv1D stores (in, out): the update is transposed. attn.c_proj is square, so a mistake would still fit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=512)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    adapter = make_adapter(tmp_path / "gpt2", tmp_path / "adapter", None, target_modules=target)
    merge(tmp_path / "gpt2", adapter, tmp_path / "merged")
    state = load_file(adapter / WEIGHTS)
    merged, stored = merged_tensors(tmp_path / "merged"), load_file(tmp_path / "gpt2" / "model.safetensors")
    changed = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in state}
    assert len(changed) == 2
    for layer in changed:
        A, B = (state[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
        expected = stored[f"{layer}.weight"] + 6.0 / 4 * (B @ A).T
        assert relative_error(merged[f"{layer}.weight"].float(), expected) < BF16_ROUNDING


# ---- variants and mixtures --------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA": dict(use_rslora=True),
    "DoRA": dict(use_dora=True, target_modules="all-linear"),
    "patterns": dict(rank_pattern="q_proj=2", alpha_pattern="v_proj=3"),
    "layer range": dict(layers="1", target_modules="all-linear"),
    "PiSSA": dict(init="pissa"),
    "LoftQ, two rounds": dict(init="loftq", loftq_iterations=2),
    "AdaLoRA": dict(use_adalora=True, alpha=400.0),
    "biases": dict(bias="all"),
    "norms": dict(modules_to_save="norm"),
    "embeddings": dict(modules_to_save="embed_tokens"),
    "head": dict(modules_to_save="lm_head"),
    "new tokens": dict(new_tokens=",".join(f"<token{i}>" for i in range(40))),
}


VOCABULARY = ("embeddings", "head", "new tokens")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Bases with biases; the head of the second is tied to the embeddings."""
    sizes = dict(hidden_size=128, intermediate_size=256, attention_bias=True)
    folder = tmp_path_factory.mktemp("biased")
    return {
        tied: save_tiny_llama(
            folder / f"tied-{tied}", tokenizer=tiny_tokenizer(), **sizes, tie_word_embeddings=tied
        )
        for tied in (False, True)
    }


def make_variant(base: Path, directory: Path, size: float = 0.1, **settings: Any) -> Path:
    """An adapter of any kind, each of its parameters moved a little from where it starts."""
    from qlora.adapters.peft_files import save_adapter
    from qlora.data.tokenizer_files import add_tokens
    from qlora.lora.adapter import inject_lora
    from qlora.lora.svd_start import initialize_adapter
    from qlora.lora.trainable import freeze_base

    network = load_base_model(str(base), compute_dtype="float32", cache=False)
    config = LoRAConfig(**{"rank": 4, "alpha": 8.0, **settings})
    tokenizer = load_tokenizer(str(base))
    if config.new_tokens:
        add_tokens(tokenizer, config.new_tokens)
    inject_lora(network, config, 0, tokenizer)
    initialize_adapter(network, config)
    freeze_base(network)
    generator = torch.Generator().manual_seed(2)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        noise = (
            size * torch.randn(parameter.shape, generator=generator) * parameter.detach().float().std().clamp(0.3)
        )
        parameter.data += noise.to(parameter.dtype)
    assert trained
    save_adapter(network, directory, config, str(base))
    return directory


@pytest.mark.parametrize(
    "variant, tied", [*((name, False) for name in VARIANTS), *((name, True) for name in VOCABULARY)]
)
def test_variants(biased: dict[bool, Path], tmp_path: Path, variant: str, tied: bool) -> None:
    """transformers' own model on the saved weights against base + adapter: bf16 rounding of the weights apart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.adapters.load import load_adapter

    base = biased[tied]
    adapter = make_variant(base, tmp_path / "adapter", **VARIANTS[variant])
    network = load_base_model(str(base), compute_dtype="float32", cache=False)
    plain = logits(network)
    load_adapter(network, adapter)
    expected = logits(network)
    merge(base, adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative_error(logits(model), expected) < 5 * BF16_ROUNDING
    assert relative_error(plain, expected[..., : plain.shape[-1]]) > 15 * BF16_ROUNDING
    assert logits(model).shape == expected.shape
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    names = AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
    assert ("<token7>" in names) == (variant == "new tokens")


@pytest.mark.parametrize("save_4bit", [False, True])
def test_a_head_trained_apart(biased: dict[bool, Path], tmp_path: Path, save_4bit: bool) -> None:
    """PEFT trains the head of a tied model by itself: merged, the two are tied no longer."""
    from qlora.adapters.load import load_adapter

    adapter = make_variant(biased[True], tmp_path / "adapter", modules_to_save="lm_head")
    damage_adapter(adapter, lambda state: state.pop("base_model.model.model.embed_tokens.weight"))
    described = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**described, "modules_to_save": ["lm_head"]}))
    network = load_base_model(str(biased[True]), compute_dtype="float32", cache=False)
    embedding = network.model.embed_tokens.weight.detach().bfloat16()
    load_adapter(network, adapter)
    merge(biased[True], adapter, tmp_path / "merged", save_4bit=save_4bit)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = merged_tensors(tmp_path / "merged")
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    head = network.lm_head.weight.detach().bfloat16()
    assert torch.equal(tensors["lm_head.weight"], head) and not torch.equal(head, embedding)
    if not save_4bit:
        assert relative_error(logits(load_merged(tmp_path / "merged")), logits(network)) < 5 * BF16_ROUNDING


@pytest.mark.parametrize("variant", ["DoRA", "PiSSA", "biases", "head", "new tokens"])
def test_variants_in_4bit(biased: dict[bool, Path], tmp_path: Path, variant: str) -> None:
    """Updates as large as the weights: the merged weights but for 4-bit rounding (0.09 on Gaussian weights, twice
    that with feedback); what is not in 4 bits is that of the 16-bit merge."""
    base_path = biased[variant == "head"]
    adapter = make_variant(base_path, tmp_path / "adapter", 0.8, **VARIANTS[variant])
    merge(base_path, adapter, tmp_path / "merged")
    merge(base_path, adapter, tmp_path / "packed", save_4bit=True)
    expected = merged_tensors(tmp_path / "merged")
    packed = load_base_model(str(tmp_path / "packed"), compute_dtype="float32", cache=False)
    base = dict(load_base_model(str(base_path), compute_dtype="float32", cache=False).named_parameters())
    changed = 0
    for name, parameter in packed.named_parameters():
        if not isinstance(parameter, Params4bit):
            assert torch.equal(parameter.bfloat16(), expected[name]), name
            continue
        weight = reference.dequantize(parameter)
        error = relative_error(weight, expected[name].float())
        if torch.equal(reference.dequantize(base[name]), weight):
            assert error < BF16_ROUNDING
        else:
            before = relative_error(reference.dequantize(base[name]), expected[name].float())
            assert error < 0.3 and error < 0.6 * before
            changed += 1
    assert changed >= 4


def test_several_adapters(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """W + sum w_i s_i B_i A_i, parameters trained in full included; the drift's reference computes the same."""
    other = make_variant(llama, tmp_path / "other", target_modules="v_proj,down_proj", modules_to_save="norm")
    weights = [0.5, -2.0]
    drift = merge(llama, adapter, tmp_path / "merged", drift=True, weights=weights, others=[other])
    base = plain_merge(llama, adapter, QuantConfig())
    with_first, with_other = base, plain_merge(llama, other, QuantConfig())
    alone = {**with_first}
    state = load_file(adapter / WEIGHTS)
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        alone[name] = base[name] - 1.5 * (state[key.replace("lora_A", "lora_B")].float() @ state[key].float())
    expected = {name: W + 0.5 * (with_first[name] - W) - 2.0 * (with_other[name] - W) for name, W in alone.items()}
    assert_rounded(merged_tensors(tmp_path / "merged"), expected)
    assert drift is not None and drift.mean_kl < 1e-3


# ---- back into 4 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig("fp4", double_quant=False)], ids=str)
def test_4bit_checkpoint(llama: Path, tmp_path: Path, quant: QuantConfig) -> None:
    """transformers loads it as the bitsandbytes checkpoint it is, and so do we: the same weights. Layers without
    an adapter keep the bits of the base; the others do not fall back to them."""
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(llama, tmp_path / "adapter", quant, target_modules="q_proj,v_proj")
    merge(llama, adapter, tmp_path / "merged", save_4bit=True, max_shard_gb=60_000 / 1e9)
    ours = load_base_model(str(tmp_path / "merged"), compute_dtype="float32", cache=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = load_base_model(str(llama), True, quant, "float32", cache=False)
    assert base_info(ours).quantization == quant
    assert theirs.config.quantization_config.bnb_4bit_quant_type == quant.quant_type
    assert theirs.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    packed = [name for name, p in ours.named_parameters() if isinstance(p, Params4bit)]
    assert len(packed) == 14 and len(list((tmp_path / "merged").glob("*.safetensors"))) >= 3
    merged = plain_merge(llama, adapter, quant)
    for name in packed:
        own, other, old = (model.get_parameter(name) for model in (ours, theirs, base))
        weight = reference.dequantize(own)
        assert torch.equal(weight, reference.dequantize(other)) and type(other) is Params4bit
        if "q_proj" in name or "v_proj" in name:
            assert (
                relative_error(weight, merged[name])
                < 0.3
                < relative_error(reference.dequantize(old), merged[name])
            )
        else:
            assert torch.equal(own.data, old.data) and torch.equal(weight, reference.dequantize(old))
    for name, parameter in theirs.named_parameters():
        if name not in packed:
            assert_rounded({name: parameter.detach().bfloat16()}, {name: merged[name]})


def test_odd_sizes_stay_aligned(tmp_path: Path) -> None:
    """33 scales of one byte each: what comes behind them must still start at a multiple of its item size."""
    base = save_tiny_llama(tmp_path / "base", tokenizer=tiny_tokenizer(), intermediate_size=33)
    merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", save_4bit=True)
    content = (tmp_path / "merged" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    wide = [entry["data_offsets"][0] for entry in header.values() if entry.get("dtype") == "F32"]
    assert size % 8 == 0 and wide and all(start % 4 == 0 for start in wide)
    assert len(merged_tensors(tmp_path / "merged")["model.layers.0.mlp.up_proj.weight.absmax"]) == 33
    load_base_model(str(tmp_path / "merged"), compute_dtype="float32", cache=False)


def test_calibration_file(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """The codes are for its texts: .txt or any training data, and another choice than the built-in texts'."""
    (tmp_path / "a.txt").write_text("Two plus two is four. " * 40)
    (tmp_path / "b.jsonl").write_text('{"prompt": "2 + 2?", "completion": "It is four."}\n' * 20)
    found = []
    for calibration in (None, "a.txt", "b.jsonl"):
        path = calibration and str(tmp_path / calibration)
        merge(llama, adapter, tmp_path / f"out-{calibration}", save_4bit=True, calibration=path)
        found.append(merged_tensors(tmp_path / f"out-{calibration}")["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert "calibrated on `a.txt`" in (tmp_path / "out-a.txt" / "README.md").read_text()
    (tmp_path / "empty.txt").write_text("")
    for name, message in (
        ("empty.txt", "has no text"),
        ("none.txt", "cannot be read"),
        ("x.bin", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            merge(llama, adapter, tmp_path / "merged", save_4bit=True, calibration=str(tmp_path / name))
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))


def test_what_cannot_go_into_4bit(llama: Path, adapter: Path, tmp_path: Path) -> None:
    plain = make_adapter(llama, tmp_path / "plain", None)
    with pytest.raises(InputError, match="16-bit base, so there are no 4-bit scales"):
        merge(llama, plain, tmp_path / "merged", save_4bit=True)
    with pytest.raises(InputError, match="leave out --save-4bit"):
        merge(llama, adapter, tmp_path / "merged", save_4bit=True, base="original")
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**tiny_llama_config().to_dict() | dict(num_local_experts=2, num_experts_per_tok=1))
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tiny_tokenizer().save_pretrained(tmp_path / "experts")
    with pytest.raises(InputError, match="cannot load a 4-bit mixture of experts"):
        merge(tmp_path / "experts", adapter, tmp_path / "merged", save_4bit=True)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "experts"}


def test_adapters_that_do_not_go_together(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Each refusal names the adapter; nothing is written."""
    plain = make_adapter(llama, tmp_path / "plain", None)
    dora = make_variant(llama, tmp_path / "dora", use_dora=True)
    pissa = make_variant(llama, tmp_path / "pissa", init="pissa")
    for others, options, message in [
        ([plain], {}, "plain on one in 16 bits; merge them one at a time"),
        ([pissa], {}, "pissa holds an adapter for a base that was changed"),
        ([dora], dict(drift=True), "dora holds a DoRA adapter"),
        ([dora], dict(save_4bit=True), "dora holds a DoRA adapter"),
        ([dora], dict(weights=[1.0]), "one number per adapter"),
        ([dora], dict(weights=[1.0, math.nan]), "one number per adapter"),
    ]:
        with pytest.raises(InputError, match=message):
            merge(llama, adapter, tmp_path / "merged", others=others, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "dora", "pissa"}
    merge(llama, adapter, tmp_path / "merged", others=[dora])  # without a look at the drift, any sum will do


# ---- the directory ----------------------------------------------------------------------------------------


def test_sharded_output(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """The same tensors as in one file, in files of at most the given size, and an index that is complete."""
    merge(llama, adapter, tmp_path / "single")
    merge(llama, adapter, tmp_path / "sharded", max_shard_gb=60_000 / 1e9)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    single, sharded = merged_tensors(tmp_path / "single"), merged_tensors(tmp_path / "sharded")
    assert all(torch.equal(sharded[name], tensor) for name, tensor in single.items())
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == single.keys() == sharded.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in single.values())
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        assert {index["weight_map"][name] for name in names} == {file.name}
        assert sum(single[name].nbytes for name in names) <= 60_000 and names
    assert torch.equal(logits(load_merged(tmp_path / "sharded")), logits(load_merged(tmp_path / "single")))
    assert not (tmp_path / "single" / "model.safetensors.index.json").exists()


def test_tensor_larger_than_a_shard(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """It gets a file of its own."""
    merge(llama, adapter, tmp_path / "merged", max_shard_gb=1 / 1e9)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == len(merged_tensors(tmp_path / "merged"))


def test_ordinary_model_directory(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """transformers loads and generates with it, in bf16; no trace of 4 bits; readable as the umask says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(llama, adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert {tensor.dtype for tensor in merged_tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype is torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=3)
    assert tokens.shape == (1, ids["input_ids"].shape[1] + 5)
    assert "model.safetensors" in os.listdir(tmp_path / "merged")
    umask = os.umask(0)
    os.umask(umask)
    for file in (tmp_path / "merged").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_tied_stays_tied(tmp_path: Path) -> None:
    tied = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True, tokenizer=tiny_tokenizer())
    adapter = make_adapter(tied, tmp_path / "adapter")
    merge(tied, adapter, tmp_path / "merged")
    assert "lm_head.weight" not in merged_tensors(tmp_path / "merged")
    model = load_merged(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_rounded(merged_tensors(tmp_path / "merged"), plain_merge(tied, adapter, QuantConfig()))


def test_tokenizer_and_chat_template_travel(llama: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    merge(llama, adapter, tmp_path / "merged")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "merged"))
    messages = [{"role": "user", "content": "Hi, you"}, {"role": "assistant", "content": "Hello"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert after.special_tokens_map == before.special_tokens_map and after.eos_token == "<|im_end|>"
    assert after.encode("some text") == before.encode("some text")


def test_tokenizer_without_template_gets_the_one_trained_with(tmp_path: Path) -> None:
    """Others then prompt the merged model as it was trained: byte for byte our own prompt."""
    from transformers import AutoTokenizer

    from qlora.data.encode import encode_prompt

    plain = tiny_tokenizer(chat_template=False, add_bos=True)
    base = save_tiny_llama(tmp_path / "base", tokenizer=plain)
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == encode_prompt(messages, plain)


def test_invalid_generation_config_travels(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """A temperature without sampling, as LLaMA-2's own, which transformers may refuse to save: copied."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    text = json.dumps(
        {"temperature": 0.6, "do_sample": False, "eos_token_id": [2, 5], "max_new_tokens": 9}
    )  # 2 is the tokenizer's own
    (base / "generation_config.json").write_text(text)
    merge(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "generation_config.json").read_text() == text
    assert load_merged(tmp_path / "merged").generation_config.eos_token_id == [2, 5]


def test_model_card(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """It names the base, the adapter's size, the weights merged onto and the drift."""
    drift = merge(llama, adapter, tmp_path / "merged", drift=True)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert text.startswith("---\n")
    for part in ("rank 4, alpha 6", "dequantized (nf4, double quantization True)", f"`{llama.name}`", str(drift)):
        assert part in text
    merge(llama, adapter, tmp_path / "unmeasured", base="original")
    text = (tmp_path / "unmeasured" / "README.md").read_text()
    assert "not measured" in text and "original" in text


# ---- the drift --------------------------------------------------------------------------------------------


def test_drift_against_the_plain_formula() -> None:
    """KL(p || q) = sum p (log p - log q), position by position; texts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    expected = [3 * torch.randn(n, 11, generator=generator) for n in (4, 1, 7)]
    actual = [tensor + 1.5 * torch.randn(tensor.shape, generator=generator) for tensor in expected]
    divergences, same, largest = [], 0, 0.0
    for one, other in zip(expected, actual, strict=True):
        for x, y in zip(one.tolist(), other.tolist(), strict=True):
            p = [math.exp(v) / sum(map(math.exp, x)) for v in x]
            q = [math.exp(v) / sum(map(math.exp, y)) for v in y]
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same += x.index(max(x)) == y.index(max(y))
            largest = max(largest, *(abs(a - b) for a, b in zip(x, y, strict=True)))
    drift = compare_logits(expected, actual)
    assert drift.mean_kl == pytest.approx(sum(divergences) / 12, rel=1e-9)
    assert drift.max_logit_difference == pytest.approx(largest, rel=1e-9)
    assert drift.num_tokens == 12 and 0 < same < 12 and drift.greedy_agreement == pytest.approx(same / 12)
    assert drift.mean_kl > 0.01
    assert compare_logits(actual, expected).mean_kl != drift.mean_kl
    reported = str(Drift(1.5e-4, 0.25, 0.975, 40))
    assert "1.50e-04 nats" in reported and "0.250" in reported and "97.5% of 40" in reported


def test_no_drift_of_equal_logits() -> None:
    values = [torch.randn(5, 7)]
    assert compare_logits(values, [tensor.clone() for tensor in values]) == Drift(0.0, 0.0, 1.0, 5)


def exact_in_bf16(shape: torch.Size, seed: int) -> Tensor:
    """Multiples of 1/256 below 1/4: seven bits, so that adding a few of them stays exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-50, 51, shape, generator=generator) / 256


def test_no_drift_where_bf16_is_exact(tmp_path: Path) -> None:
    """A 16-bit base and an update that are exact in bf16 merge without a trace: what is left is the order of
    fp32 sums, (W + s B A) x against W x + s B (A x)."""
    from transformers import LlamaForCausalLM

    base = save_tiny_llama(tmp_path / "base", tokenizer=tiny_tokenizer())
    model = LlamaForCausalLM(tiny_llama_config())
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = (
            torch.ones_like(parameter) if parameter.dim() == 1 else exact_in_bf16(parameter.shape, seed)
        )
    model.save_pretrained(base)
    network = load_base_model(str(base), use_4bit=False, compute_dtype="float32")
    adapted = get_lora_model(network, LoRAConfig(rank=4, alpha=8.0, adapter_dtype="float32"))
    for A, B in zip(*[iter(adapted.lora_parameters())] * 2, strict=True):
        A.data = torch.eye(4, A.shape[1])  # one feature each: the update is four columns of s B
        B.data = exact_in_bf16(B.shape, B.shape[0])
    adapted.save(tmp_path / "adapter")
    drift = merge(base, tmp_path / "adapter", tmp_path / "merged", drift=True)
    assert drift is not None and drift.num_tokens > 100
    assert drift.mean_kl < 1e-9 and drift.adapter_perplexity == pytest.approx(drift.merged_perplexity, rel=1e-5)
    assert drift.max_logit_difference < 1e-4 and drift.greedy_agreement == 1.0


def test_drift_of_the_two_bases(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """bf16 rounding for the dequantized base, the whole of NF4's error for the original one."""
    dequantized = merge(llama, adapter, tmp_path / "dequantized", drift=True)
    original = merge(llama, adapter, tmp_path / "original", drift=True, base="original")
    assert dequantized is not None and original is not None
    assert 0 < dequantized.mean_kl < 1e-3
    assert original.mean_kl > 20 * dequantized.mean_kl
    assert original.max_logit_difference > dequantized.max_logit_difference > 0


def test_perplexity_against_the_plain_formula() -> None:
    """exp of -mean log p(next token), over texts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(n, 11, generator=generator) for n in (5, 3)]
    texts = [[1, 4, 10, 0, 2], [7, 7, 3]]
    losses = []
    for scores, ids in zip(logits, texts, strict=True):
        for row, token in zip(scores.tolist(), ids[1:], strict=False):
            losses.append(-math.log(math.exp(row[token]) / sum(map(math.exp, row))))
    assert len(losses) == 6
    assert perplexity(logits, texts) == pytest.approx(math.exp(sum(losses) / 6), rel=1e-9)


@pytest.mark.parametrize("save_4bit", [False, True])
def test_drift_is_stored_and_comes_again(llama: Path, adapter: Path, tmp_path: Path, save_4bit: bool) -> None:
    """drift.json holds what was returned, and loading the directory again gives the same figures."""
    (tmp_path / "text.txt").write_text("The weather is nice today, and tomorrow it will rain. " * 5)
    for source in (None, str(tmp_path / "text.txt")):
        output = tmp_path / f"merged-{source is None}"
        drift = merge(llama, adapter, output, drift=True, drift_text=source, save_4bit=save_4bit)
        assert drift is not None and drift.adapter_perplexity != drift.merged_perplexity
        assert json.loads((output / "drift.json").read_text()) == asdict(drift)
        mixture = qlora.export.mixture.read_mixture([str(adapter)])
        texts = load_drift_texts(load_tokenizer(str(output)), source, 512)
        assert qlora.export.merge.measure_merged(str(llama), mixture, output, save_4bit, texts) == drift
        assert sum(map(len, texts.prompts + texts.passages)) == drift.num_tokens
        assert bool(texts.prompts) == (source is None)
    assert merge(llama, adapter, tmp_path / "unmeasured") is None
    assert not (tmp_path / "unmeasured" / "drift.json").exists()


def test_max_drift(llama: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A check that fails with exit code 3 and one sentence, and nothing left; one that holds changes nothing."""
    argv = ["--model", str(llama), "--adapter", str(adapter), "--output-dir", str(tmp_path / "merged")]
    assert command(*argv, "--base", "original", "--max-drift", "1e-6") == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "more than --max-drift 1e-06 allows" in error and "was not written" in error
    assert list(tmp_path.iterdir()) == []
    for wrong in ("nan", "-1", "inf"):
        assert command(*argv, "--max-drift", wrong) == 2
    assert command(*argv, "--max-drift", "1", "--no-drift") == 2
    assert list(tmp_path.iterdir()) == []
    assert command(*argv, "--max-drift", "0.01") == 0


# ---- what is refused --------------------------------------------------------------------------------------


def test_output_that_exists(llama: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("mine")
    with pytest.raises(InputError, match=r"merged exists already; remove it or choose another"):
        merge(llama, adapter, tmp_path / "merged")
    assert everything_below(tmp_path) == {"merged", "merged/precious"}


def damage_adapter(directory: Path, change: Any) -> None:
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS, metadata)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGES = {
    "half of a pair": lambda state: state.pop(f"{Q0}.lora_B.weight"),
    "NaN": lambda state: state[f"{Q0}.lora_B.weight"].fill_(torch.nan),
    "infinity": lambda state: state[f"{Q0}.lora_A.weight"].fill_(torch.inf),
    "misshapen": lambda state: state.update({f"{Q0}.lora_A.weight": torch.ones(4, 65)}),
    "ranks differ": lambda state: state.update({f"{Q0}.lora_A.weight": torch.ones(3, 64)}),
    "another rank": lambda state: state.update(
        {f"{Q0}.lora_A.weight": torch.ones(8, 64), f"{Q0}.lora_B.weight": torch.ones(64, 8)}
    ),
    "no such layer": lambda state: state.update(
        {f"{Q0}x.lora_A.weight": torch.ones(4, 64), f"{Q0}x.lora_B.weight": torch.ones(64, 4)}
    ),
}


@pytest.mark.parametrize("check_drift", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapter(llama: Path, adapter: Path, tmp_path: Path, damage: str, check_drift: bool) -> None:
    """Named whether or not the drift is measured, and nothing is left where the output would have been."""
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    damage_adapter(broken, DAMAGES[damage])
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj"):
        merge(llama, broken, tmp_path / "merged", drift=check_drift)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


@pytest.mark.parametrize("change", [dict(hidden_size=128), dict(num_hidden_layers=1)], ids=["width", "depth"])
@pytest.mark.parametrize("check_drift", [False, True])
def test_adapter_of_another_base(adapter: Path, tmp_path: Path, change: dict[str, int], check_drift: bool) -> None:
    other = save_tiny_llama(tmp_path / "other", tokenizer=tiny_tokenizer(), **change)
    with pytest.raises(InputError, match=str(adapter)):
        merge(other, adapter, tmp_path / "merged", drift=check_drift)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_original_of_a_16bit_base(llama: Path, tmp_path: Path) -> None:
    """Without 4 bits both are the same weights."""
    adapter = make_adapter(llama, tmp_path / "adapter", None)
    for base in ("dequantized", "original"):
        merge(llama, adapter, tmp_path / base, base=base)
    ours, theirs = (merged_tensors(tmp_path / base) for base in ("dequantized", "original"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_failing_disk(llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part is written when it happens: nothing of that name; whole files wait for the next try."""
    merging, shards = qlora.export.merge, qlora.model.shards
    for module, part, left in (
        (shards, "_write_file", 0),
        (merging, "write_metadata", 1),
        (merging, "make_merged_card", 1),
    ):

        def fail(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module, part, fail)
            with pytest.raises(OSError, match="No space left"):
                merge(llama, adapter, tmp_path / "merged")
        assert [path.name.rpartition(".")[2] for path in tmp_path.iterdir()] == ["partial"] * left
    merge(llama, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


# ---- killed and resumed -----------------------------------------------------------------------------------

KILL = """
import os, signal, sys
import qlora.export.merge
import qlora.export.merged_weights
import qlora.export.mixture
from qlora.config.merge import MergeOptions
from qlora.export.merge import merge_adapter
model, adapter, output = sys.argv[1:]
finish = qlora.export.merged_weights.sha256_of
def die(file):
    if "-00003-" in file.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(file)
qlora.export.merged_weights.sha256_of = die
merge_adapter(model, adapter, output, MergeOptions(max_shard_gb=60_000 / 1e9, drift=False))
"""


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def left_behind(output: Path) -> Path:
    """The staging directory of a merge that was stopped."""
    assert not output.exists()
    (staging,) = output.parent.glob(f".{output.name}.*.partial")
    return staging


def stop_merge(number: int, model: Path, adapter: Path, output: Path, **options: Any) -> Path:
    """Merge until file `number` is written but not yet noted, then Ctrl-C; returns what it leaves."""
    finish = qlora.export.merged_weights.sha256_of

    def stop(file: Path) -> str:
        if f"-0000{number}-" in file.name:
            raise KeyboardInterrupt
        return finish(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qlora.export.merged_weights, "sha256_of", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(model, adapter, output, max_shard_gb=60_000 / 1e9, **options)
    return left_behind(output)


def assert_resumes(llama: Path, adapter: Path, tmp_path: Path, **options: Any) -> None:
    """The next try keeps the first two files as they are, and ends with the bytes of one that never stopped."""
    merge(llama, adapter, tmp_path / "whole", max_shard_gb=60_000 / 1e9, **options)
    first = min(left_behind(tmp_path / "merged").glob("model-*.safetensors"))
    written = first.stat().st_mtime_ns, first.stat().st_ino
    (first.parent / ".model-9.safetensors.17.tmp").touch()  # as a kill leaves them while one is written,
    (tmp_path / ".merged.17.tmp").mkdir()  # or while all are put in their place
    heard: list[str] = []
    merge(llama, adapter, tmp_path / "merged", say=heard.append, max_shard_gb=60_000 / 1e9, **options)
    num_files = len(list((tmp_path / "whole").glob("*.safetensors")))
    assert heard == [f"continuing an interrupted merge: 2 of {num_files} files are finished"] and num_files >= 3
    kept = (tmp_path / "merged" / first.name).stat()
    assert (kept.st_mtime_ns, kept.st_ino) == written
    assert file_bytes(tmp_path / "merged") == file_bytes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "whole"}


def test_killed_and_resumed(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """SIGKILL, in another process, while the third file is finished."""
    argv = [str(llama), str(adapter), str(tmp_path / "merged")]
    result = fork_server.run([sys.executable, "-c", KILL, *argv], cwd=REPOSITORY, capture_output=True)
    assert result.returncode == -9, result.stderr.decode()
    assert_resumes(llama, adapter, tmp_path)


def test_4bit_merge_stopped_and_resumed(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Only the layers that are left are calibrated, and they get the codes they would have got."""
    stop_merge(3, llama, adapter, tmp_path / "merged", save_4bit=True)
    assert_resumes(llama, adapter, tmp_path, save_4bit=True)


def test_a_damaged_file_is_written_again(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Every finished file is compared with its checksum before it is kept."""
    merge(llama, adapter, tmp_path / "whole", max_shard_gb=60_000 / 1e9)
    staging = stop_merge(4, llama, adapter, tmp_path / "merged")
    with open(sorted(staging.glob("model-*.safetensors"))[1], "r+b") as file:
        position = file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(position)
        file.write(bytes([last ^ 1]))
    heard: list[str] = []
    merge(llama, adapter, tmp_path / "merged", max_shard_gb=60_000 / 1e9, say=heard.append)
    assert "2 of " in heard[0]
    assert file_bytes(tmp_path / "merged") == file_bytes(tmp_path / "whole")


def test_other_weights_of_the_same_size_and_time_start_afresh(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """As `cp -p` leaves them: half of the merged model was that of the old ones."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    staging = stop_merge(2, base, adapter, tmp_path / "merged")
    file = base / "model.safetensors"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-4:] = bytes(4)  # the last value
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    staging.rename(tmp_path / "old")
    again = stop_merge(2, base, adapter, tmp_path / "merged")
    assert again.name != staging.name and file.stat().st_size == status.st_size


def test_other_inputs_start_afresh(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """What a merge of other weights, settings or adapters has left is neither used nor touched."""
    staging = stop_merge(2, llama, adapter, tmp_path / "merged")
    left = file_bytes(staging)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    damage_adapter(other, lambda state: state[f"{Q0}.lora_B.weight"].mul_(2))
    heard: list[str] = []
    for options in (
        dict(max_shard_gb=50_000 / 1e9),
        dict(max_shard_gb=60_000 / 1e9, base="original"),
        dict(max_shard_gb=60_000 / 1e9, weights=[0.5]),
        dict(max_shard_gb=60_000 / 1e9, adapter=other),
    ):
        merge(
            **{"model": llama, "adapter": adapter, "output": tmp_path / "merged", "say": heard.append, **options}
        )
        shutil.rmtree(tmp_path / "merged")
    assert heard == [] and file_bytes(staging) == left


def test_two_merges_at_once(llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the same inputs and output is refused, and the first goes on."""
    finish = qlora.export.merge.write_metadata

    def meanwhile(*args: Any) -> None:
        with pytest.raises(InputError, match="Another merge is writing"):
            merge(llama, adapter, tmp_path / "merged")
        finish(*args)

    monkeypatch.setattr(qlora.export.merge, "write_metadata", meanwhile)
    merge(llama, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


# ---- the command ------------------------------------------------------------------------------------------


def command(*argv: str) -> int:
    return run(command_line.main, ["merge", *argv])


def test_command(llama: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is the one that the adapter names; the drift is printed, or left out by --no-drift."""
    assert command("--adapter", str(adapter), "--output-dir", str(tmp_path / "a"), "--max-shard-gb", "0.0001") == 0
    printed = capsys.readouterr().out
    assert f"Merged model saved to {tmp_path / 'a'}" in printed and "Drift from base + adapter: KL" in printed
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    argv = ["--adapter", str(adapter), "--model", str(llama), "--base", "original", "--no-drift"]
    assert command(*argv, "--output-dir", str(tmp_path / "b")) == 0
    assert "drift" not in capsys.readouterr().out.lower()
    assert_rounded(merged_tensors(tmp_path / "a"), plain_merge(llama, adapter, QuantConfig()))
    assert_rounded(merged_tensors(tmp_path / "b"), plain_merge(llama, adapter, None))


def test_command_in_4bit(llama: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several adapters by weight, back into 4 bits."""
    argv = ["--adapter", str(adapter), str(adapter), "--weights", "0.75", "0.25", "--save-4bit"]
    assert command(*argv, "--output-dir", str(tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    assert "load it in 4 bits" in printed and "perplexity" in printed
    card = (tmp_path / "a" / "README.md").read_text()
    assert (
        "0.75 x a LoRA adapter" in card and "back in 4 bits" in card and "transformers loads it in 4 bits" in card
    )
    merged = load_base_model(str(tmp_path / "a"), compute_dtype="float32", cache=False)
    for name, expected in plain_merge(llama, adapter, QuantConfig()).items():
        weight = merged.get_parameter(name)
        dense = reference.dequantize(weight) if isinstance(weight, Params4bit) else weight.float()
        assert relative_error(dense, expected) < 0.3  # equal adapters, of weights that add up to one


def test_command_with_wrong_inputs(
    llama: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line, nothing written."""
    nameless = Path(shutil.copytree(adapter, tmp_path / "nameless"))
    description = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**description, "base_model_name_or_path": ""}))
    truncated = Path(shutil.copytree(adapter, tmp_path / "truncated"))
    os.truncate(truncated / WEIGHTS, 100)
    output = ["--output-dir", str(tmp_path / "merged")]
    for argv, message in [
        (["--adapter", str(nameless)], "names no base; pass --model"),
        (["--adapter", str(truncated)], "is not a complete safetensors file"),
        (["--adapter", str(truncated), "--model", str(llama)], "is not a complete safetensors file"),
        (["--adapter", str(adapter), "--model", "/no/such/base"], "/no/such/base does not exist"),
        (["--adapter", str(tmp_path / "none"), "--model", str(llama)], "has no adapter_config.json"),
        (["--adapter", str(adapter), "--output-dir", str(nameless)], "exists already"),
    ]:
        assert command(*output, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path.name for path in tmp_path.iterdir()} == {"nameless", "truncated"}


# ---- memory -----------------------------------------------------------------------------------------------

# Peak from /proc: a child's ru_maxrss starts at the peak of the process that started it.
MEASURE_MERGING = """
import re, sys
from qlora.config.merge import MergeOptions
from qlora.export.merge import merge_adapter
peak = lambda: 1024 * int(re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1])
tiny, tiny_adapter, large, adapter, output = sys.argv[1:]
merge_adapter(tiny, tiny_adapter, output + "-tiny", MergeOptions(drift=False))  # libraries, kernels
before = peak()
merge_adapter(large, adapter, output, MergeOptions(drift=False))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_near_one_tensor(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """A model of 250 MB in fp32 (125 MB merged) whose largest tensor is 17 MB.

    One tensor in fp32, its codes and its bf16 copy. 44 MB seen; holding the merged model would add 125.
    """
    from transformers import LlamaForCausalLM

    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=8)
    config = tiny_llama_config(**sizes, num_hidden_layers=4, vocab_size=4096)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    pool = torch.randn(4096 * 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {name: pool[: shape.numel()].clone().view(shape) for name, shape in shapes.items()}
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 230e6
    large, large_adapter = tmp_path / "large", tmp_path / "adapter"
    tiny_tokenizer().save_pretrained(large)
    config.save_pretrained(large)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(adapter, large_adapter)
    layer = "base_model.model.model.layers.2.mlp.up_proj"
    A, B = 0.1 * torch.randn(4, 1024), 0.1 * torch.randn(2816, 4)
    factors = {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    save_file(factors, large_adapter / WEIGHTS, {"base_quantization": json.dumps(asdict(QuantConfig()))})
    settings = json.loads((large_adapter / "adapter_config.json").read_text())
    settings["target_modules"] = ["layers.2.mlp.up_proj"]
    (large_adapter / "adapter_config.json").write_text(json.dumps(settings))

    paths = [str(path) for path in (llama, adapter, large, large_adapter, tmp_path / "merged")]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_MERGING, *paths],
        cwd=REPOSITORY,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed goes back at once: live memory
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    growth = int(result.stdout)
    assert growth < 4 * largest, f"{growth / 1e6:.0f} MB"
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    name = "model.layers.2.mlp.up_proj.weight"
    codes, state = quantize_4bit(tensors[name], blocksize=64, compress_statistics=True, quant_type="nf4")
    dequantized = reference.dequantize(SimpleNamespace(data=codes, quant_state=state))
    assert relative_error(merged.float(), dequantized + 1.5 * (B @ A)) < BF16_ROUNDING
