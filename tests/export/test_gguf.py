"""export/gguf.py, export/gguf_vocabulary.py, export/ollama.py: .gguf files against their source, and in the hands
of others.

Tests marked llama_cpp run where a binding of llama.cpp is installed (`pip install xllamacpp`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.cli import main as command_line
from qlora.cli.exits import run
from qlora.config.lora import LoRAConfig
from qlora.export.gguf import export_adapter, export_gguf
from qlora.export.gguf_vocabulary import PRE_TOKENIZERS, pre_tokenizer_name
from qlora.export.ollama import write_modelfile
from qlora.lora.adapter import inject_lora
from qlora.lora.svd_start import initialize_adapter
from qlora.model.gguf_source import GGUFSource
from qlora.model.load import load_base_model
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from tests import reference
from tests.export.test_merge import make_adapter
from tests.models import TINY
from tests.reference import relative_error
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

IDS = torch.arange(3, 40)[None]
FP32_TOLERANCE = 1e-5
TEXTS = (
    "hello there, and the end",
    "  two  spaces\n\n\n\ttabs ",
    "12 and 3456, 7.8",
    "Größe 你好 🦙 e\u0301",
    "I'll don't WE'VE",
    "<|im_start|>user\nHi<|im_end|>\n",
)


def words_tokenizer(**options: Any) -> Any:
    """The tiny tokenizer, splitting text into GPT-2's words first as llama.cpp's "gpt-2" does."""
    tokenizer = tiny_tokenizer(**options)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


def save_model(directory: Path, config: Any, tokenizer: Any = None, seed: int = 0) -> Path:
    """A random model of any architecture, its matrices large enough to matter and its norms no ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=0.5 * name.endswith("norm.weight"), std=0.15)
    model.save_pretrained(directory)
    (tokenizer or words_tokenizer()).save_pretrained(directory)
    return directory


def config_of(kind: str, **settings: Any) -> Any:
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    own = dict(bos_token_id=None, eos_token_id=2, pad_token_id=None, head_dim=16)
    if kind == "qwen3":
        own["head_dim"] = 128  # transformers' GGUF reader takes its default, which all published ones have
    if kind == "qwen2":
        own.pop("head_dim")
    return classes[kind](**{**TINY, **own, "tie_word_embeddings": False, **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", config_of("llama"))


def load(path: Path) -> Any:
    """transformers' own model of a directory or .gguf file."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits[0]


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def rotary_order(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp wants them, one by one: Hugging Face has pair i of a head in rows i and i + d/2."""
    d = len(weight) // heads
    rows = [h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in range(2)]
    return weight[rows]


def expected_tensors(weights: dict[str, Tensor], permuted: bool) -> dict[str, Tensor]:
    """llama.cpp's name -> values, of a tiny model's tensors."""
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in whole:
            found[f"{whole[module]}.{kind}"] = tensor
            continue
        _, _, layer, part = module.split(".", 3)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
        found[f"blk.{layer}.{parts[part]}.{kind}"] = rotary_order(tensor, heads) if heads and permuted else tensor
    return found


# ---- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_encoding(llama: Path, tmp_path: Path, encoding: Any) -> None:
    """Each tensor under its name, its rows in place, in the codes that the gguf package makes of it."""
    export_gguf(str(llama), tmp_path / "model.gguf", encoding)
    written = tensors_of(tmp_path / "model.gguf")
    expected = expected_tensors(load_file(llama / "model.safetensors"), permuted=True)
    assert written.keys() == expected.keys() and len(written) == 21
    for name, tensor in written.items():
        kind = encoding.upper()
        if "norm" in name:
            kind = "F32"
        elif encoding[:2] in ("q4", "q5") and name in ("token_embd.weight", "output.weight"):
            kind = "Q8_0"
        assert tensor.tensor_type.name == kind, name
        assert tuple(reversed(tensor.shape)) == tuple(expected[name].shape), name
        codes = gguf.quantize(expected[name].numpy(), tensor.tensor_type)
        assert np.array_equal(np.asarray(tensor.data), codes.reshape(tensor.data.shape)), name
    fields = fields_of(tmp_path / "model.gguf")
    file_type = {"f32": "ALL_F32"}.get(encoding, f"MOSTLY_{encoding.upper()}")
    assert fields["general.file_type"] == gguf.LlamaFileType[file_type] and fields["general.type"] == "model"


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """f16 instead, as llama.cpp's converter does."""
    model = save_model(tmp_path / "model", config_of("llama", intermediate_size=72))
    export_gguf(str(model), tmp_path / "model.gguf", "q8_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "model.gguf").items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert logits(load(tmp_path / "model.gguf")).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str, tied: bool) -> None:
    """Exactly: fp32 in, fp32 out, whatever the rows' order. A tied head is not written twice."""
    model = save_model(tmp_path / "model", config_of(kind, tie_word_embeddings=tied, rms_norm_eps=1e-5))
    export_gguf(str(model), tmp_path / "model.gguf", "f32")
    assert ("output.weight" in tensors_of(tmp_path / "model.gguf")) is not tied
    assert torch.equal(logits(load(tmp_path / "model.gguf")), logits(load(model)))


@pytest.mark.parametrize(("encoding", "kind"), [("f16", "llama"), ("q8_0", "qwen3"), ("q4_0", "llama")])
def test_we_read_the_same_model(tmp_path: Path, encoding: Any, kind: str) -> None:
    """Our reader gives the values that the codes stand for; the model it makes is transformers' on them."""
    model = save_model(tmp_path / "model", config_of(kind))
    export_gguf(str(model), tmp_path / "model.gguf", encoding)
    source, weights = GGUFSource(tmp_path / "model.gguf"), load_file(model / "model.safetensors")
    assert source.names == weights.keys()
    codec = gguf.GGMLQuantizationType[encoding.upper()]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        rounded = gguf.dequantize(gguf.quantize(weights[name].numpy(), codec), codec)
        assert torch.equal(source.read(name), torch.from_numpy(rounded)), name
    assert torch.equal(source.read("model.norm.weight"), weights["model.norm.weight"])
    network = load_base_model(str(tmp_path / "model.gguf"), False, compute_dtype="float32", cache=False)
    plain = load(tmp_path / "model.gguf")
    for parameter in plain.parameters():  # our matrices are kept in bf16
        parameter.data = parameter.data.bfloat16().float() if parameter.dim() == 2 else parameter.data
    assert relative_error(logits(network), logits(plain)) < FP32_TOLERANCE


def test_a_gguf_base_hands_on_its_metadata(llama: Path, tmp_path: Path) -> None:
    """Written again, a file has the same tensors, vocabulary and licence; q8_0 of q8_0 is itself."""
    export_gguf(str(llama), tmp_path / "first.gguf", "q8_0")
    export_gguf(str(tmp_path / "first.gguf"), tmp_path / "second.gguf", "q8_0")
    first, second = tensors_of(tmp_path / "first.gguf"), tensors_of(tmp_path / "second.gguf")
    assert list(first) == list(second)
    assert all(np.array_equal(first[name].data, second[name].data) for name in first)
    before, after = fields_of(tmp_path / "first.gguf"), fields_of(tmp_path / "second.gguf")
    assert before.pop("general.name") == "first" and after.pop("general.name") == "second"
    assert before == after and "tokenizer.chat_template" in before


def test_context_ends_where_the_window_does(tmp_path: Path) -> None:
    """llama.cpp has no sliding window in its llama architecture; up to its length both are the same."""
    model = save_model(tmp_path / "model", config_of("mistral", sliding_window=64))
    export_gguf(str(model), tmp_path / "model.gguf", "f16")
    assert fields_of(tmp_path / "model.gguf")["llama.context_length"] == 64


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", [QuantConfig(), None], ids=str)
def test_adapter_merged_on_the_way(llama: Path, tmp_path: Path, quant: QuantConfig | None) -> None:
    """dequantized(W) + (alpha / rank) B A, in fp32, of the quantization that the adapter was trained with."""
    adapter = make_adapter(llama, tmp_path / "adapter", quant, target_modules="q_proj,down_proj")
    export_gguf(str(llama), tmp_path / "model.gguf", "f32", adapter=str(adapter))
    weights = load_file(llama / "model.safetensors")
    state = load_file(adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        if quant is not None and "_proj" in name:
            codes, quant_state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            weights[name] = reference.dequantize(SimpleNamespace(data=codes, quant_state=quant_state))
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in state:
            update = state[f"{key}B.weight"].float() @ state[f"{key}A.weight"].float()
            weights[name] = weights[name] + 6.0 / 4 * update
    written = tensors_of(tmp_path / "model.gguf")
    for name, tensor in expected_tensors(weights, permuted=True).items():
        assert relative_error(torch.from_numpy(np.array(written[name].data)), tensor) < FP32_TOLERANCE, name


PATTERNS = {"rank_pattern": "v_proj=2,layers.1.self_attn.q_proj=3", "alpha_pattern": "v_proj=9"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, PATTERNS],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapter_alone(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """What llama.cpp computes, (alpha / rank) b a with each tensor's own rank, is the update, rows in order."""
    model = save_model(tmp_path / "model", config_of(kind))
    adapter = make_adapter(model, tmp_path / "adapter", target_modules="q_proj,v_proj,up_proj", **settings)
    export_adapter(str(model), str(adapter), tmp_path / "lora.gguf", "f32")
    fields, written = fields_of(tmp_path / "lora.gguf"), tensors_of(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == kind and fields["adapter.lora.alpha"] == 6.0
    state = load_file(adapter / "adapter_model.safetensors")
    updates = {}
    for layer in sorted({key.rpartition(".lora_")[0] for key in state}):
        A, B = (state[f"{layer}.lora_{part}.weight"].double() for part in "AB")
        rank, alpha = len(A), 9.0 if settings.get("alpha_pattern") and "v_proj" in layer else 6.0
        scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        updates[f"{layer.removeprefix('base_model.model.')}.weight"] = scaling * (B @ A)
    expected = expected_tensors(updates, permuted=kind == "llama")
    assert len(expected) == 6 and written.keys() == {f"{name}.lora_{part}" for name in expected for part in "ab"}
    for name, update in expected.items():
        a, b = (torch.from_numpy(np.array(written[f"{name}.lora_{part}"].data)).double() for part in "ab")
        assert relative_error(6.0 / len(a) * (b @ a), update) < FP32_TOLERANCE, name
    if not settings:
        b = torch.from_numpy(np.array(written["blk.0.ffn_up.weight.lora_b"].data))
        assert torch.equal(b, state["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].float())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": "lm_head"}], ids=str)
def test_adapter_that_is_more_than_low_rank(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """It cannot go alone, but merged it can."""
    adapter = make_adapter(llama, tmp_path / "adapter", None, **settings)
    with pytest.raises(InputError, match=r"a LoRA \.gguf cannot hold; export the merged model instead"):
        export_adapter(str(llama), str(adapter), tmp_path / "lora.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    export_gguf(str(llama), tmp_path / "model.gguf", "f32", adapter=str(adapter))
    saved, stored = read_adapter(adapter), GGUFSource(tmp_path / "model.gguf")
    for name in ("model.layers.1.self_attn.v_proj.weight", "lm_head.weight"):
        expected = saved.merge_into(name, load_file(llama / "model.safetensors")[name])
        assert torch.equal(stored.read(name), expected), name


def test_adapter_with_a_base_of_its_own(llama: Path, tmp_path: Path) -> None:
    """PiSSA's was exported onto the ordinary base once, silently; its way out is a merge."""
    model = load_base_model(str(llama), compute_dtype="float32", cache=False)
    config = LoRAConfig(rank=4, init="pissa")
    inject_lora(model, config)
    initialize_adapter(model, config)
    save_adapter(model, tmp_path / "adapter", config)
    with pytest.raises(InputError, match="merge it first, then export the merged model"):
        export_gguf(str(llama), tmp_path / "model.gguf", adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "model.gguf").exists()


def test_adapter_encodings(llama: Path, tmp_path: Path) -> None:
    """A rank that is no whole block goes as f16; 4 bits are refused."""
    adapter = make_adapter(llama, tmp_path / "adapter")
    export_adapter(str(llama), str(adapter), tmp_path / "lora.gguf", "q8_0")
    kinds = {name[-6:]: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "lora.gguf").items()}
    assert kinds == {"lora_a": "Q8_0", "lora_b": "F16"}
    with pytest.raises(InputError, match=r"--type q4_0 would lose too much; choose f32, f16, bf16, q8_0\."):
        export_adapter(str(llama), str(adapter), tmp_path / "other.gguf", "q4_0")


def test_adapter_of_another_base(llama: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", config_of("llama", hidden_size=128, head_dim=32))
    adapter = make_adapter(other, tmp_path / "adapter")
    for write in (
        lambda: export_adapter(str(llama), str(adapter), tmp_path / "model.gguf"),
        lambda: export_gguf(str(llama), tmp_path / "model.gguf", adapter=str(adapter)),
    ):
        with pytest.raises(InputError, match="was made for another base"):
            write()
    assert not (tmp_path / "model.gguf").exists()


# ---- rotary embedding -------------------------------------------------------------------------------------

LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=5e4, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)


def test_llama3_scaling(tmp_path: Path) -> None:
    """The plain frequencies over the divisors are those that transformers computes with."""
    config = config_of("llama", rope_parameters=LLAMA3)
    model = save_model(tmp_path / "model", config)
    export_gguf(str(model), tmp_path / "model.gguf", "f16")
    divisors = torch.from_numpy(np.array(tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"].data))
    plain = torch.tensor([1e4 ** (-2 * i / 16) for i in range(8)])
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(plain / divisors, scaled, rtol=1e-6, atol=0)
    assert divisors.min() == 1.0 and divisors.max() == 8.0


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    for name, rope in (("linear", LINEAR), ("yarn", YARN), ("attention", {**YARN, "attention_factor": 1.3})):
        model = save_model(tmp_path / name, config_of("qwen2", rope_parameters=rope))
        export_gguf(str(model), tmp_path / f"{name}.gguf", "f16")
        fields = fields_of(tmp_path / f"{name}.gguf")
        assert fields["qwen2.rope.freq_base"] == rope["rope_theta"]
        assert fields["qwen2.rope.scaling.type"] == rope["rope_type"]
        assert fields["qwen2.rope.scaling.factor"] == 4.0
        if name != "linear":
            assert fields["qwen2.rope.scaling.original_context_length"] == 128
            usual = 0.1 * math.log(4.0) + 1.0
            expected = 1.0 if name == "yarn" else 1.3 / usual
            assert math.isclose(fields["qwen2.rope.scaling.attn_factor"], expected, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "rope_type 'yarn' with beta_fast"),
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3', which qwen2 files cannot hold"),
        ("llama", {"hidden_act": "gelu"}, "has hidden_act gelu"),
        ("qwen3", {"attention_bias": True}, "has attention biases"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(
    tmp_path: Path, kind: str, settings: dict[str, Any], reason: str
) -> None:
    """Refused, and nothing is left behind."""
    model = save_model(tmp_path / "model", config_of(kind, **settings))
    with pytest.raises(InputError, match=reason):
        export_gguf(str(model), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_architectures(tmp_path: Path) -> None:
    sizes = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    model = save_model(tmp_path / "gpt2", GPT2Config(**sizes, bos_token_id=None, eos_token_id=2))
    with pytest.raises(InputError, match="is a gpt2 model; models like llama, mistral, qwen2, qwen3 can"):
        export_gguf(str(model), tmp_path / "model.gguf")


def test_values_beyond_f16(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", config_of("llama"))
    network = load(model)
    network.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    network.save_pretrained(model)
    with pytest.raises(InputError, match=r"up_proj\.weight has values outside the range of f16; .*bf16"):
        export_gguf(str(model), tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_gguf(str(model), tmp_path / "model.gguf", "bf16")


# ---- tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [True, False])
def test_byte_level_tokenizer(tmp_path: Path, add_bos: bool) -> None:
    """transformers reads back one that encodes, decodes and renders alike; rows without a token are unused."""
    tokenizer = words_tokenizer(add_bos=add_bos)
    model = save_model(tmp_path / "model", config_of("llama"), tokenizer)
    export_gguf(str(model), tmp_path / "model.gguf")
    fields = fields_of(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    roles = {"bos": 4, "eos": 2, "padding": 3}
    assert {role: fields[f"tokenizer.ggml.{role}_token_id"] for role in roles} == roles
    assert fields["tokenizer.ggml.add_bos_token"] is add_bos
    assert fields["tokenizer.ggml.add_eos_token"] is False
    types = fields["tokenizer.ggml.token_type"]
    assert types[:5] == [3] * 5 and types[5:269] == [1] * 264 and types[269:] == [5] * 31
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert read(text, add_special_tokens=False)["input_ids"] == plain and len(plain) > 3
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert read.chat_template == CHATML_TEMPLATE


def test_tokenizer_without_template_gets_the_one_trained_with(tmp_path: Path) -> None:
    from qlora.data.chat_template import fallback_template

    tokenizer = words_tokenizer(chat_template=False, add_bos=True)
    model = save_model(tmp_path / "model", config_of("llama"), tokenizer)
    export_gguf(str(model), tmp_path / "model.gguf")
    assert fields_of(tmp_path / "model.gguf")["tokenizer.chat_template"] == fallback_template(tokenizer)


def sentencepiece_like(prepend: str = "normalizer") -> Any:
    """Llama 2's kind: ▁ for a space, bytes for what has no token, merges in order."""
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyz,.", "é"})
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("▁a", "n"), ("e", "r"), ("▁", "▁")]
    merges += [("l", "l"), ("he", "ll"), ("hell", "o"), ("in", "g"), ("t", "h"), ("th", "er"), ("r", "e")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words += [left + right for left, right in merges]
    model = models.BPE(
        {word: row for row, word in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in words[:3]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHATML_TEMPLATE,
    )
    return tokenizer


SPM_TEXTS = ("hello there", "  in the other  hell", "another thing, rather: 你 é", "t", "the the ther re")


@pytest.mark.parametrize("prepend", ["normalizer", "first", "never"])
def test_sentencepiece_tokenizer(tmp_path: Path, prepend: str) -> None:
    """Its merges, turned into scores, are found again by transformers, which derives merges from scores."""
    tokenizer = sentencepiece_like(prepend)
    model = save_model(tmp_path / "model", config_of("llama", vocab_size=330), tokenizer)
    export_gguf(str(model), tmp_path / "model.gguf")
    fields = fields_of(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is (prepend != "never")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    assert [types[tokens.index(token)] for token in ("<s>", "<0x0A>", "he", "[PAD329]")] == [3, 6, 1, 5]
    assert scores["▁t"] == 0.0 and scores["he"] == -1.0 and scores["hello"] == -10.0
    if prepend != "first":  # transformers' reader has one way for all
        return
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in SPM_TEXTS:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert read(text, add_special_tokens=False)["input_ids"] == plain


def splitter(name: str) -> Any:
    """The tokenizers library's own objects for what Llama 3, Qwen 2, SmolLM, ... have in tokenizer.json."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return words
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    pattern = {
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }[{"smaug-bpe": "llama-bpe"}.get(name, name)]
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("name", list(PRE_TOKENIZERS))
def test_splitters_are_recognized(name: str) -> None:
    backend = tiny_tokenizer().backend_tokenizer
    backend.pre_tokenizer = splitter(name)
    description = json.loads(backend.to_str())
    description["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    assert pre_tokenizer_name(description) == name
    description["normalizer"] = {"type": "NFC"}
    assert pre_tokenizer_name(description) == name
    description["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(InputError, match="pass its name with --pre-tokenizer NAME"):
        pre_tokenizer_name(description)


def test_unknown_splitter(tmp_path: Path) -> None:
    """The tiny tokenizer splits not at all, which llama.cpp cannot; a name may be given."""
    model = save_model(tmp_path / "model", config_of("llama"), tiny_tokenizer())
    with pytest.raises(InputError, match=r"splits text unlike any known splitter .*gpt-2, smollm"):
        export_gguf(str(model), tmp_path / "model.gguf")
    export_gguf(str(model), tmp_path / "model.gguf", pre_tokenizer="chameleon")
    assert fields_of(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == "chameleon"


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", config_of("llama", vocab_size=250))
    with pytest.raises(InputError, match="The tokenizer has 269 tokens but the embedding 250 rows"):
        export_gguf(str(model), tmp_path / "model.gguf")


# ---- the command and the Modelfile ------------------------------------------------------------------------


def test_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model and an adapter alone, each with a Modelfile, by one command; then every refusal, exit code 2."""
    adapter = make_adapter(llama, tmp_path / "adapter")
    (tmp_path / "lora").mkdir()
    files = {"model": tmp_path / "model.gguf", "lora": tmp_path / "lora" / "lora.gguf"}
    both = ["export", "--model", str(llama), "--adapter", str(adapter), "--modelfile"]
    assert run(command_line.main, [*both, "--output", str(files["model"]), "--type", "q8_0"]) == 0
    assert run(command_line.main, [*both, "--output", str(files["lora"]), "--adapter-only"]) == 0
    assert "llama-cli -m BASE.gguf --lora" in capsys.readouterr().out
    assert tensors_of(files["model"])["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    stop = 'PARAMETER stop "<|im_end|>"\n'
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\nPARAMETER stop ") and text.endswith(stop)
    text = (tmp_path / "lora" / "Modelfile").read_text()
    assert text.startswith("FROM ./llama.gguf\nADAPTER ./lora.gguf\nPARAMETER stop ") and text.endswith(stop)
    before = files["model"].read_bytes()
    for arguments, message in (
        ([], "Nothing to export; pass --model, --adapter or both"),
        (["--model", str(llama), "--adapter-only"], "--adapter-only needs an adapter"),
        (["--model", str(llama), "--output", str(files["model"])], "model.gguf exists already"),
        (["--model", str(llama), "--output", str(tmp_path / "a.bin")], "does not end in .gguf"),
        (["--model", str(llama), "--output", str(tmp_path / "b.gguf"), "--modelfile"], "Modelfile exists already"),
    ):
        assert run(command_line.main, ["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert files["model"].read_bytes() == before and not (tmp_path / "b.gguf").exists()


def test_modelfile_takes_nothing_but_text(tmp_path: Path) -> None:
    """A token or a template that would end its own quotes brings no instruction with it: every line is ours."""
    tokenizer = words_tokenizer()
    tokenizer.chat_template = CHATML_TEMPLATE + '{# """\nADAPTER /etc/passwd\n""" #}'
    tokenizer.add_special_tokens({"eos_token": '"\nADAPTER /etc/passwd\n"'})
    write_modelfile(tmp_path / "model.gguf", tokenizer)
    first, *stops = (tmp_path / "Modelfile").read_text().splitlines()
    assert first == "FROM ./model.gguf" and stops and all(line.startswith('PARAMETER stop "') for line in stops)
    assert any("ADAPTER" in line for line in stops)


# ---- the real model ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_gguf_written_again(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2: same names, shapes, vocabulary and settings; its q8_0 embedding and fp32 norms to the bit.

    gguf spends seconds in Python on the vocabulary each time, so the file is opened once for all.
    """
    first = gguf.GGUFReader(smollm2)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda *args: first)
        patch.setattr("qlora.model.gguf_source._bounded_reader", lambda: gguf.GGUFReader)
        export_gguf(smollm2, tmp_path / "model.gguf", "q8_0")
    second = gguf.GGUFReader(tmp_path / "model.gguf")
    before, after = ({tensor.name: tensor for tensor in reader.tensors} for reader in (first, second))
    assert before.keys() == after.keys() and len(before) == 272
    for name, tensor in after.items():
        assert list(tensor.shape) == list(before[name].shape), name
        if "norm" in name or name == "token_embd.weight":
            assert np.array_equal(tensor.data, before[name].data), name
        else:
            assert tensor.tensor_type.name == "Q8_0", name
    shared = [name for name in first.fields if name.startswith(("llama.", "tokenizer.", "general.license"))]
    assert len(shared) == 23
    for name in shared:
        ours, theirs = second.fields[name], first.fields[name]
        assert ours.types == theirs.types, name
        pairs = zip(ours.data, theirs.data, strict=True)
        assert all(np.array_equal(ours.parts[i], theirs.parts[j]) for i, j in pairs), name


# ---- llama.cpp itself -------------------------------------------------------------------------------------


class LlamaCpp:
    """A model in llama.cpp: natural logarithms of the next token's probabilities, and its tokenizer."""

    def __init__(self, file: Path, lora: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(file), 512, 1, 0
        params.warmup, params.n_gpu_layers = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def complete(self, ids: list[int], num_tokens: int, num_words: int) -> list[dict[str, Any]]:
        """Of each greedy token: its id, and `top_logprobs` of the `num_words` likeliest."""
        request = {"prompt": ids, "n_predict": num_tokens, "temperature": 0, "n_probs": num_words}
        answer = self.server.handle_completions({**request, "cache_prompt": False})
        choice: dict[str, Any] = answer["choices"][0]
        return (choice["logprobs"] or {"content": []})["content"]

    def log_probabilities(self, ids: list[int], vocab_size: int) -> Tensor:
        (token,) = self.complete(ids, 1, vocab_size)
        found = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
        assert len(found) == vocab_size
        return torch.tensor([found[row] for row in range(vocab_size)])

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        from urllib.request import Request, urlopen

        body = json.dumps({"content": text, "add_special": add_special, "parse_special": True}).encode()
        request = Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request) as response:
            found: list[int] = json.load(response)["tokens"]
        return found


@pytest.fixture
def llama_cpp() -> type[LlamaCpp]:
    pytest.importorskip("xllamacpp", reason="no binding of llama.cpp; pip install xllamacpp")
    return LlamaCpp


def prompt_that_goes_on(model: Any, length: int = 50) -> list[int]:
    """Random ids after which the likeliest token is text; of an end, or half a letter, llama.cpp tells nothing."""
    tokenizer = words_tokenizer()
    for seed in range(100):
        ids = torch.randint(5, 269, (length,), generator=torch.Generator().manual_seed(seed))
        if tokenizer.decode(logits(model, ids[None])[-1].argmax(), skip_special_tokens=True).strip().isalnum():
            return ids.tolist()
    raise AssertionError("no prompt goes on with text")


ROPE_SETTINGS = [LLAMA3, LINEAR, YARN, {**YARN, "attention_factor": 1.3}]


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {}),
        *(("llama", {"rope_parameters": rope}) for rope in ROPE_SETTINGS),
    ],
)
def test_llama_cpp_computes_the_same(
    llama_cpp: type[LlamaCpp], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """In fp32, on both sides of the context that a scaling starts from: what is left is the order of the sums."""
    model = save_model(tmp_path / "model", config_of(kind, rms_norm_eps=1e-5, **settings))
    export_gguf(str(model), tmp_path / "model.gguf", "f32")
    network = load(model)
    for length in (20, 200):
        ids = prompt_that_goes_on(network, length)
        expected = logits(network, torch.tensor([ids]))[-1].log_softmax(-1)
        found = llama_cpp(tmp_path / "model.gguf").log_probabilities(ids, 300)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": "v_proj=2"}], ids=str)
def test_llama_cpp_adds_the_adapter(
    llama_cpp: type[LlamaCpp], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Base and adapter in two files give what merged weights in one give, and not what the base alone does."""
    model = save_model(tmp_path / "model", config_of(kind))
    adapter = make_adapter(model, tmp_path / "adapter", None, target_modules="all-linear", **settings)
    export_gguf(str(model), tmp_path / "base.gguf", "f32")
    export_gguf(str(model), tmp_path / "merged.gguf", "f32", adapter=str(adapter))
    export_adapter(str(model), str(adapter), tmp_path / "lora.gguf", "f32")
    ids = prompt_that_goes_on(load(tmp_path / "merged.gguf"))
    merged = llama_cpp(tmp_path / "merged.gguf").log_probabilities(ids, 300)
    both = llama_cpp(tmp_path / "base.gguf", tmp_path / "lora.gguf").log_probabilities(ids, 300)
    torch.testing.assert_close(both, merged, rtol=0, atol=1e-4)
    expected = logits(load(tmp_path / "merged.gguf"), torch.tensor([ids]))[-1].log_softmax(-1)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    base = logits(load(model), torch.tensor([ids]))[-1].log_softmax(-1)
    assert (base - merged).abs().max() > 0.1


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_llama_cpp_splits_text_alike(llama_cpp: type[LlamaCpp], tmp_path: Path, name: str) -> None:
    """Merges that reach over digits, spaces and letters show where text is split."""
    tokenizer = tiny_tokenizer(add_bos=True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pairs = ["1 2", "12 3", "3 4", "l l", "' ll", "Ġ 1", "d o", "do n", "don '", "ĊĊ Ċ", "Ġ Ġ", "ĠĠ t", ", Ġ"]
    backend["model"]["merges"] += [pair.split(" ") for pair in pairs]
    for left, right in backend["model"]["merges"]:
        backend["model"]["vocab"].setdefault(left + right, len(backend["model"]["vocab"]))
    backend["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="<|im_end|>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = splitter(name)
    model = save_model(tmp_path / "model", config_of("llama"), tokenizer)
    export_gguf(str(model), tmp_path / "model.gguf", "f16")
    served = llama_cpp(tmp_path / "model.gguf")
    for text in TEXTS:
        assert served.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert served.tokenize(text, add_special=True) == tokenizer(text)["input_ids"], text


@pytest.mark.llama_cpp
@pytest.mark.parametrize("prepend", ["normalizer", "first", "never"])
def test_llama_cpp_reads_sentencepiece(llama_cpp: type[LlamaCpp], tmp_path: Path, prepend: str) -> None:
    """Metaspace adds no space before a text that begins with one, llama.cpp and SentencePiece do."""
    tokenizer = sentencepiece_like(prepend)
    model = save_model(tmp_path / "model", config_of("llama", vocab_size=330), tokenizer)
    export_gguf(str(model), tmp_path / "model.gguf", "f16")
    served = llama_cpp(tmp_path / "model.gguf")
    for text in (text.lstrip() if prepend == "first" else text for text in SPM_TEXTS):
        assert served.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
