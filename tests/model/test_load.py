"""model/load.py: every way to load a base, against transformers' own model with plainly dequantized weights."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlora.model.load
import qlora.model.shards
import qlora.model.weights
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora
from qlora.model.base import base_info
from qlora.model.gguf_source import GGUFSource
from qlora.model.hf_config import load_config, metadata_directory
from qlora.model.load import cached_compute_dtype, load_base_model
from qlora.model.resolve import resolve_model
from qlora.model.safetensors_source import SafetensorsSource
from qlora.model.skeleton import empty_model, weight_shapes
from qlora.model.tokenizer import load_tokenizer
from qlora.model.weights import dequantized_weights
from qlora.quant.layers import Linear4bit, Linear16bit
from qlora.quant.storage import packed_tensors
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system import digests
from qlora.system.errors import InputError
from tests import reference
from tests.models import TINY, save_tiny_llama
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order
BF16_TOLERANCE = 0.03  # activations rounded to 8 bits, a dozen times in a row
LINEARS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of its own, empty at first."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def prequantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bitsandbytes checkpoint as transformers makes it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    directory = tmp_path_factory.mktemp("models") / "prequantized"
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=options, dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


def load(directory: Path, use_4bit: bool = True, **options: Any) -> Any:
    return load_base_model(str(directory), use_4bit, **{"compute_dtype": "float32", **options})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def plainly_quantized(weight: Tensor, quant: QuantConfig) -> Tensor:
    """What bitsandbytes' codes of a weight stand for, by the plain reference."""
    codes, state = quantize_4bit(
        weight, blocksize=quant.block_size, compress_statistics=quant.double_quant, quant_type=quant.quant_type
    )
    return reference.dequantize(SimpleNamespace(data=codes, quant_state=state))


def reference_model(directory: Path, quant: QuantConfig | None) -> Any:
    """transformers' own model: matrices of the blocks quantized by the plain reference (None: rounded to bf16),
    embeddings and head rounded to bf16, all computed in fp32.

    A Conv1D is quantized as the linear layer it stands for; the experts of a layer are stacked, (E, out, in), gate
    over up, and each matrix is quantized by itself.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    def stored(weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16).float() if quant is None else plainly_quantized(weight, quant)

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **eager)
    head, changed = model.get_output_embeddings(), 0
    with torch.no_grad():
        for module in model.modules():
            if module is head or isinstance(module, nn.Embedding):
                module.weight.data = module.weight.to(torch.bfloat16).float()
            elif isinstance(module, nn.Linear):
                module.weight.data = stored(module.weight)
            elif isinstance(module, Conv1D):
                module.weight.data = stored(module.weight.T.contiguous()).T.contiguous()
            elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                for stacked in (*module.gate_up_proj.chunk(2, dim=1), module.down_proj):
                    for matrix in stacked:
                        matrix.copy_(stored(matrix.contiguous()))
            else:
                continue
            changed += 1
    assert changed > 2
    return model


def packed_bytes(model: Any) -> dict[str, Tensor]:
    """A copy of every byte that the 4-bit layers are made of."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            state = parameter.quant_state
            parts = [parameter.data, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
            tensors.update({f"{name}.{i}": part.clone() for i, part in enumerate(parts)})
    assert tensors
    return tensors


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected and actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def edit_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(directory: Path, change: Any) -> None:
    """Rewrite model.safetensors with `change` applied to its dict of tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(llama, tmp_path / "copied"))


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quant",
    [QuantConfig(), QuantConfig("fp4"), QuantConfig(double_quant=False), QuantConfig(block_size=128)],
    ids=str,
)
def test_4bit_against_transformers(llama: Path, quant: QuantConfig) -> None:
    """Logits, and that it is really in 4 bits: far from the unquantized model's."""
    model = load(llama, quant=quant)
    expected = logits(reference_model(llama, quant))
    assert relative_error(logits(model), expected) < FP32_TOLERANCE
    assert relative_error(logits(reference_model(llama, None)), expected) > 0.02
    assert base_info(model).quantization == quant and base_info(model).compute_dtype is torch.float32


def test_bf16_compute_against_transformers(llama: Path) -> None:
    model = load(llama, compute_dtype="bfloat16")
    assert base_info(model).compute_dtype is torch.bfloat16 and logits(model).dtype is torch.bfloat16
    expected = logits(reference_model(llama, QuantConfig()).to(torch.bfloat16))
    assert relative_error(logits(model), expected) < BF16_TOLERANCE


def test_sharded_equals_single_file(llama: Path, tmp_path: Path) -> None:
    sharded = save_tiny_llama(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same_tensors(packed_bytes(load(sharded)), packed_bytes(load(llama)))
    assert torch.equal(logits(load(sharded)), logits(load(llama)))


def test_without_4bit_equals_transformers_in_bf16(llama: Path) -> None:
    """Every weight is the stored one rounded to bf16, norms and biases as stored; computed in fp32."""
    model = load(llama, use_4bit=False)
    expected = reference_model(llama, None)
    assert relative_error(logits(model), logits(expected)) < FP32_TOLERANCE
    assert base_info(model).quantization is None
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), theirs[name])
        assert parameter.dtype is (torch.float32 if "norm" in name else torch.bfloat16)


def test_what_is_4bit_and_what_is_not(llama: Path) -> None:
    """The blocks' seven linears are; embeddings and head are bf16, norms fp32; nothing trains."""
    model = load(llama)
    four_bit = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert four_bit == {f"model.layers.{i}.{part}" for i in range(2) for part in LINEARS}
    assert isinstance(model.lm_head, Linear16bit)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in four_bit:
            assert parameter.dtype is (torch.float32 if "norm" in name else torch.bfloat16), name
        else:
            assert parameter.dtype is torch.uint8, name
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("use_4bit", [True, False])
def test_tied_embeddings_stay_tied(tmp_path: Path, use_4bit: bool) -> None:
    """One storage, fresh and from the cache, and the head is not in 4 bits."""
    tied = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    quant = QuantConfig() if use_4bit else None
    for _ in ("fresh", "cached"):
        model = load(tied, use_4bit)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype is torch.bfloat16
        assert relative_error(logits(model), logits(reference_model(tied, quant))) < FP32_TOLERANCE


def test_tied_weight_stored_twice(tmp_path: Path) -> None:
    """Some checkpoints of tied models store the head as well: accepted, and still one storage."""
    tied = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    expected = logits(load(tied))
    edit_weights(tied, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = load(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_evaluating_leaves_the_4bit_bytes_alone(llama: Path, compute_dtype: str) -> None:
    """bitsandbytes' own layer repacks its weight in place when it evaluates on an AVX512-BF16 CPU."""
    model = load(llama, compute_dtype=compute_dtype)
    before = packed_bytes(model)
    first = logits(model)
    with torch.inference_mode():
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    assert_same_tensors(packed_bytes(model), before)
    assert torch.equal(logits(model.eval()), first)


# ---- other architectures ----------------------------------------------------------------------------------


def save_random(directory: Path, model: Any) -> Path:
    """Save with all parameters drawn anew, biases too (they start at zero), large enough to matter."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    model.save_pretrained(directory)
    return directory


def small_gpt2(directory: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64, bos_token_id=None, eos_token_id=2
    )
    return save_random(directory, GPT2LMHeadModel(config))


@pytest.mark.parametrize("use_4bit", [True, False])
def test_qwen2_with_biases(tmp_path: Path, use_4bit: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = save_random(tmp_path / "qwen2", Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True)))
    expected = reference_model(path, QuantConfig() if use_4bit else None)
    for _ in ("fresh", "cached"):
        model = load(path, use_4bit)
        assert model.model.layers[0].self_attn.q_proj.bias.abs().sum() > 0
        assert relative_error(logits(model), logits(expected)) < FP32_TOLERANCE
    for module in expected.modules():  # guard: without its biases the model is another one
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()
    assert relative_error(logits(expected), logits(model)) > 0.01


def test_mistral_with_a_sliding_window(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    path = save_random(tmp_path / "mistral", MistralForCausalLM(MistralConfig(**TINY, sliding_window=5)))
    model = load(path)
    assert relative_error(logits(model), logits(reference_model(path, QuantConfig()))) < FP32_TOLERANCE
    edit_config(path, sliding_window=None)
    assert relative_error(logits(reference_model(path, QuantConfig())), logits(model)) > 0.01


def test_gpt2_without_4bit(tmp_path: Path) -> None:
    """With Conv1D layers, biases and learned positions; also from files that leave the `transformer.` prefix out,
    and store masks that today's module computes."""
    path = small_gpt2(tmp_path / "gpt2")
    expected = logits(reference_model(path, None))
    # Conv1D weights may be kept in fp32 or in bf16; rounding them is one bf16 rounding of every weight.
    assert relative_error(logits(load(path, use_4bit=False)), expected) < BF16_TOLERANCE

    def as_on_the_hub(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    original = logits(load(path, use_4bit=False))
    edit_weights(path, as_on_the_hub)
    assert torch.equal(logits(load(path, use_4bit=False)), original)


def test_gpt2_in_4bit(tmp_path: Path, fresh_cache: Path) -> None:
    """Each Conv1D as the linear layer that it stands for; fresh, from the cache, and the codes that transformers
    makes of it, here and there."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = small_gpt2(tmp_path / "gpt2")
    expected = logits(reference_model(path, QuantConfig()))
    first = load(path)
    (cached,) = fresh_cache.iterdir()
    for model in (first, load(path)):
        assert isinstance(model.transformer.h[0].attn.c_proj, Linear4bit)
        assert relative_error(logits(model), expected) < FP32_TOLERANCE
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(path, quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "prequantized")
    assert_same_tensors(packed_bytes(load(tmp_path / "prequantized")), packed_bytes(first))
    theirs = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)
    for name, module in first.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(theirs.get_submodule(name).weight.data, module.weight.data)


def test_gpt2_stays_in_bf16(tmp_path: Path) -> None:
    """`use_4bit=False` promises two bytes a weight, for Conv1D as for Linear."""
    model = load(small_gpt2(tmp_path / "gpt2"), use_4bit=False)
    assert model.transformer.h[0].attn.c_attn.weight.dtype is torch.bfloat16


def test_gpt2_with_more_layers_than_its_config(tmp_path: Path) -> None:
    """`c_attn.bias` ends like the stored mask `attn.bias`; as an extra weight it is reported like any other."""
    path = small_gpt2(tmp_path / "gpt2")
    edit_weights(path, lambda w: w.update({"transformer.h.7.attn.c_attn.bias": torch.ones(192)}))
    with pytest.raises(InputError, match=r"unexpected transformer\.h\.7\.attn\.c_attn\.bias"):
        load(path, use_4bit=False)


# ---- the cache --------------------------------------------------------------------------------------------


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a weight was quantized although the cache has it")

    monkeypatch.setattr(qlora.model.weights, "quantize_weight", refuse)


def test_second_load_reads_the_cache(llama: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(llama)
    assert len(list(fresh_cache.iterdir())) == 1
    forbid_quantizing(monkeypatch)
    monkeypatch.setattr(SafetensorsSource, "read", _refuse_reading(llama, SafetensorsSource.read))
    second = load(llama)
    assert_same_tensors(packed_bytes(second), packed_bytes(first))
    assert_same_tensors(dict(second.named_parameters()), dict(first.named_parameters()))
    assert torch.equal(logits(second), logits(first))


def _refuse_reading(directory: Path, read: Any) -> Any:
    def wrapped(self: SafetensorsSource, name: str) -> Tensor:
        assert self.path != directory, "the source was read although the cache has it"
        return read(self, name)

    return wrapped


def test_cache_can_be_left_out(llama: Path, fresh_cache: Path) -> None:
    assert torch.equal(logits(load(llama, cache=False)), logits(load(llama)))
    shutil.rmtree(fresh_cache)
    load(llama, cache=False)
    load(llama, use_4bit=False)
    assert not fresh_cache.exists()


def test_cache_is_keyed_by_the_options(llama: Path, fresh_cache: Path) -> None:
    options = [QuantConfig(), QuantConfig("fp4"), QuantConfig(double_quant=False), QuantConfig(block_size=256)]
    fresh = [packed_bytes(load(llama, quant=quant, cache=False)) for quant in options]
    for number, quant in enumerate(options, start=1):
        load(llama, quant=quant)
        assert len(list(fresh_cache.iterdir())) == number
    for quant, expected in zip(options, fresh, strict=True):
        cached = load(llama, quant=quant)
        assert base_info(cached).quantization == quant
        assert_same_tensors(packed_bytes(cached), expected)


@pytest.mark.parametrize("remembered", [0, 2**26])
def test_cache_is_keyed_by_the_content(
    copied: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, remembered: int
) -> None:
    """Other weights under the same path, size and modification time kept as by `cp -p`: the old were used."""
    monkeypatch.setattr(digests, "REMEMBERED", remembered)
    before = packed_bytes(load(copied))
    status = (copied / "model.safetensors").stat()
    edit_weights(copied, lambda w: w["model.layers.0.mlp.up_proj.weight"].mul_(3))
    os.utime(copied / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (copied / "model.safetensors").stat().st_size == status.st_size
    after = packed_bytes(load(copied))
    assert len(list(fresh_cache.glob("base-*"))) == 2
    assert (fresh_cache / "digests").is_dir() == (remembered == 0)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert_same_tensors(after, packed_bytes(load(copied, cache=False)))


def test_the_same_weights_elsewhere_are_not_quantized_again(
    llama: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed_bytes(load(llama))
    forbid_quantizing(monkeypatch)
    assert_same_tensors(packed_bytes(load(copied)), first)


def flip_bit(file: Path, place: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(place)
        (byte,) = handle.read(1)
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "added", "no digests", "index"])
def test_a_damaged_cached_base_is_made_again(
    llama: Path, fresh_cache: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """One flipped bit of a weight was used in silence."""
    expected = packed_bytes(load(llama))
    (cached,) = fresh_cache.iterdir()
    file = cached / "model.safetensors"
    change = {
        "flipped": lambda: flip_bit(file, file.stat().st_size - 1),
        "truncated": lambda: os.truncate(file, file.stat().st_size - 1),
        "gone": lambda: file.unlink(),
        "added": lambda: (cached / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        "no digests": lambda: (cached / "digests.json").unlink(),
        "index": lambda: (cached / "digests.json").write_text("[]"),
    }
    change[damage]()
    capsys.readouterr()
    assert_same_tensors(packed_bytes(load(llama)), expected)
    assert f"{cached} in the cache is damaged" in capsys.readouterr().err
    assert_same_tensors(packed_bytes(load(llama)), expected)
    assert not capsys.readouterr().err


def test_cache_follows_a_changed_config(copied: Path) -> None:
    """What is not a weight (here the rotary base) is read from the source each time."""
    before = logits(load(copied))
    edit_config(copied, rope_parameters={"rope_theta": 50.0, "rope_type": "default"}, rope_theta=50.0)
    after = logits(load(copied))
    assert relative_error(after, before) > 0.001
    assert torch.equal(after, logits(load(copied, cache=False)))


def test_a_cache_that_cannot_be_written_is_named(
    llama: Path, smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("QLORA_CACHE", str(path))
        for action in (
            lambda: load(llama),
            lambda: metadata_directory(smollm2),
            lambda: cached_compute_dtype("auto", torch.device("cpu"), cache=True),
        ):
            with pytest.raises(
                InputError, match=f"cache {path} cannot be written .*; set QLORA_CACHE to a writable dir"
            ):
                action()
    load(llama, cache=False)


def test_what_a_killed_start_left_of_the_cache_goes(llama: Path, fresh_cache: Path) -> None:
    load(llama)
    (cached,) = fresh_cache.iterdir()
    left = cached.with_name(f".{cached.name}.4711.tmp")
    os.rename(cached, left)
    other = fresh_cache / ".of-another-base.4711.tmp"  # another process may be at it
    other.mkdir()
    load(llama)
    assert sorted(fresh_cache.iterdir()) == [other, cached]


def test_a_second_process_waits_for_the_cache(llama: Path, fresh_cache: Path) -> None:
    """And takes what the first has written, without quantizing anything."""
    load(llama)
    (cached,) = fresh_cache.iterdir()
    elsewhere = cached.rename(fresh_cache.parent / "elsewhere")
    with ThreadPoolExecutor(1) as second, FileLock(f"{cached}.lock"):
        loading = second.submit(load, llama)
        with pytest.raises(TimeoutError):
            loading.result(timeout=1)
        before = elsewhere.rename(cached).stat().st_ino
    loading.result()
    assert cached.stat().st_ino == before


@pytest.mark.parametrize("moment", ["weights", "config"])
def test_cache_is_written_whole_or_not_at_all(
    llama: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A disk that fills up leaves nothing behind, and the next start writes it again."""
    write, failed = qlora.model.shards._write_file, []

    def failing(file: Path, *tensors: Any) -> None:
        write(file, *tensors)
        failed.append(file)
        if moment == "weights":
            os.truncate(file, 1000)
            raise OSError(28, "No space left on device")
        (Path(file).parent / "config.json").mkdir()  # writing the config fails

    monkeypatch.setattr(qlora.model.shards, "_write_file", failing)
    with pytest.raises(OSError):
        load(llama)
    assert failed and [path.suffix for path in fresh_cache.iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_CACHE", str(fresh_cache))
    expected = packed_bytes(load(llama))
    assert len(list(fresh_cache.iterdir())) == 1
    assert_same_tensors(packed_bytes(load(llama)), expected)


@pytest.mark.parametrize("written_under", ["float32", "bfloat16"])
def test_cache_does_not_depend_on_the_compute_dtype(copied: Path, fresh_cache: Path, written_under: str) -> None:
    """Norms are cached in fp32, whatever the run that wrote them computed in."""
    edit_weights(copied, lambda w: [w[name].add_(0.001) for name in w if "norm" in name])  # not exact in bf16
    expected = load(copied, cache=False)
    load(copied, compute_dtype=written_under)
    assert len(list(fresh_cache.iterdir())) == 1
    model = load(copied)
    assert_same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_cache(tmp_path: Path, fresh_cache: Path, tied: bool) -> None:
    """It is an ordinary bitsandbytes checkpoint: the same codes, and what they stand for gives our logits."""
    from transformers import AutoModelForCausalLM

    source = save_tiny_llama(tmp_path / "source", tie_word_embeddings=tied)
    ours = load(source)
    (cached,) = fresh_cache.iterdir()
    theirs = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)
    assert (theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()) == tied
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit):
            weight = theirs.get_submodule(name).weight
            assert torch.equal(weight.data, module.weight.data)
            assert torch.equal(reference.dequantize(weight), reference.dequantize(module.weight))
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        assert torch.equal(theirs.get_submodule(name).weight.float(), ours.get_submodule(name).weight.float())


def test_cache_in_shards(llama: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model's: every tensor once, nothing else there, the same model for us and transformers."""
    from transformers import AutoModelForCausalLM

    expected = load(llama, cache=False)
    monkeypatch.setattr(qlora.model.shards, "SHARD_BYTES", 20_000)
    first = load(llama)
    forbid_quantizing(monkeypatch)
    (cached,) = fresh_cache.iterdir()
    shards = sorted(file.name for file in cached.glob("*.safetensors"))
    count = len(shards)
    assert count > 3 and shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert {file.name for file in cached.iterdir()} == {
        *shards,
        "config.json",
        "digests.json",
        "model.safetensors.index.json",
    }
    for model in (first, load(llama)):
        assert_same_tensors(packed_bytes(model), packed_bytes(expected))
        assert_same_tensors(dict(model.named_parameters()), dict(expected.named_parameters()))
    theirs = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)
    for layer, name in ((layer, name) for layer in range(2) for name in LINEARS):
        path = f"model.layers.{layer}.{name}"
        assert torch.equal(theirs.get_submodule(path).weight.data, expected.get_submodule(path).weight.data)


# ---- already quantized checkpoints ------------------------------------------------------------------------


def test_prequantized_checkpoint(llama: Path, prequantized: Path, fresh_cache: Path) -> None:
    """transformers' codes are taken over byte for byte (and are those we make), nothing is quantized or cached."""
    model = load(prequantized)
    stored = load_file(prequantized / "model.safetensors")
    assert any(".quant_state.bitsandbytes__nf4" in name for name in stored)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(module.weight.data, stored[f"{name}.weight"])
            assert torch.equal(module.weight.quant_state.absmax, stored[f"{name}.weight.absmax"])
    assert base_info(model).quantization == QuantConfig() and not fresh_cache.exists()
    assert_same_tensors(packed_bytes(model), packed_bytes(load(llama)))
    assert relative_error(logits(model), logits(reference_model(llama, QuantConfig()))) < FP32_TOLERANCE
    assert not hasattr(model.config, "quantization_config")


def test_prequantized_with_other_options(llama: Path, tmp_path: Path) -> None:
    """The checkpoint's own type counts, not the one asked for."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "fp4")
    model = load(tmp_path / "fp4", quant=QuantConfig("nf4"))
    assert base_info(model).quantization == QuantConfig("fp4", double_quant=False)
    expected = logits(reference_model(llama, QuantConfig("fp4", double_quant=False)))
    assert relative_error(logits(model), expected) < FP32_TOLERANCE


def test_prequantized_layers_left_dense_stay_dense(llama: Path, tmp_path: Path) -> None:
    """A checkpoint that keeps a layer in 16 bits says so on purpose (Unsloth's dynamic quants do)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "q_proj"])
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "mixed")
    attention = load(tmp_path / "mixed").model.layers[0].self_attn
    assert isinstance(attention.k_proj, Linear4bit)
    dense = load_file(llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(reference.dense_weight(attention.q_proj), dense.to(torch.bfloat16).float())


def test_prequantized_head_is_refused_or_right(llama: Path, tmp_path: Path) -> None:
    """A head in 4 bits: computed with, or refused; its packed bytes must not pass for weights."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[])
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "all")
    assert "lm_head.weight.absmax" in load_file(tmp_path / "all" / "model.safetensors")
    try:
        model = load(tmp_path / "all")
    except InputError as error:
        assert "lm_head" in str(error)
        return
    expected = reference_model(llama, QuantConfig(double_quant=False))
    weight = load_file(llama / "model.safetensors")["lm_head.weight"]
    expected.lm_head.weight.data = plainly_quantized(weight, QuantConfig(double_quant=False))
    assert relative_error(logits(model), logits(expected)) < FP32_TOLERANCE


def test_prequantized_embedding(llama: Path, prequantized: Path, tmp_path: Path) -> None:
    """In 4 bits in the file: what its codes stand for. Its packed bytes once passed for weights."""
    changed = Path(shutil.copytree(prequantized, tmp_path / "changed"))
    dense = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    packed = packed_tensors(quantize_weight(dense, QuantConfig()))
    edit_weights(changed, lambda w: w.update({f"model.embed_tokens.weight{k}": t for k, t in packed.items()}))
    embedding = load(changed).model.embed_tokens.weight
    assert relative_error(embedding, plainly_quantized(dense, QuantConfig())) < 0.005  # rounded to bf16 at most


def test_prequantized_without_4bit_is_refused(prequantized: Path) -> None:
    with pytest.raises(InputError, match=r"stored in 4 bits; leave out --no-4bit"):
        load(prequantized, use_4bit=False)


def test_prequantized_misshapen(prequantized: Path, tmp_path: Path) -> None:
    """A packed weight has its logical shape beside it: it is checked like any other's."""
    broken = Path(shutil.copytree(prequantized, tmp_path / "broken"))
    edit_config(broken, intermediate_size=192)
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight is \(160, 64\) but should be \(192, 64\)"):
        load(broken)


def test_prequantized_without_its_scales(prequantized: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(prequantized, tmp_path / "broken"))
    edit_weights(broken, lambda w: w.pop("model.layers.0.mlp.up_proj.weight.absmax"))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        load(broken)


def test_8bit_checkpoint_is_refused(llama: Path, copied: Path) -> None:
    """int8 weights have the right shapes; it is their scales that give them away."""

    def to_int8(weights: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj"
        weights[f"{name}.SCB"] = weights[f"{name}.weight"].abs().amax(1)
        weights[f"{name}.weight"] = weights[f"{name}.weight"].to(torch.int8)

    edit_weights(copied, to_int8)
    with pytest.raises(InputError, match=r"unexpected model\.layers\.0\.mlp\.up_proj\.SCB"):
        load(copied)


# ---- weights that do not fit ------------------------------------------------------------------------------


def test_all_mismatches_at_once(copied: Path, fresh_cache: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        del weights["model.layers.0.self_attn.q_proj.weight"], weights["model.norm.weight"]
        weights["model.layers.9.mlp.up_proj.weight"] = torch.ones(160, 64)
        weights["model.layers.1.mlp.down_proj.weight"] = torch.ones(160, 64)
        weights["model.embed_tokens.weight"] = torch.ones(301, 64)

    edit_weights(copied, damage)
    for use_4bit in (True, False):
        with pytest.raises(InputError) as raised:
            load(copied, use_4bit)
        message = str(raised.value)
        for part in (
            "missing model.layers.0.self_attn.q_proj.weight",
            "missing model.norm.weight",
            "unexpected model.layers.9.mlp.up_proj.weight",
            "model.layers.1.mlp.down_proj.weight is (160, 64) but should be (64, 160)",
            "model.embed_tokens.weight is (301, 64) but should be (300, 64)",
        ):
            assert part in message
        assert str(copied) in message and message.count(";") == 4
    assert [path.suffix for path in fresh_cache.iterdir()] == [".lock"]


def test_stored_rotary_table_is_ignored(copied: Path) -> None:
    """LLaMA-1 checkpoints have one in each layer; today it is computed."""
    expected = logits(load(copied))
    edit_weights(copied, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(load(copied)), expected)


@pytest.mark.parametrize("keep", [0, 4, 200, 100_000, -1])
def test_truncated_safetensors(copied: Path, keep: int) -> None:
    """Cut in the length, the header, the data, or by one byte."""
    file = copied / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size - 1)
    with pytest.raises(
        InputError, match=r"model\.safetensors is not a complete safetensors file .*download it again"
    ):
        load(copied)


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load(copied)


def test_pickled_weights_are_not_read(copied: Path) -> None:
    """Unpickling runs code: a directory with only a .bin has no weights for us."""
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load(copied)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("use_4bit", [True, False])
def test_a_tensor_in_two_shards(tmp_path: Path, use_4bit: bool, place: int) -> None:
    """With two values; the last one won, whichever the index names."""
    copied, name = save_tiny_llama(tmp_path / "sharded", max_shard_size="100KB"), "model.norm.weight"
    other = sorted(copied.glob("*.safetensors"))[place]
    right = json.loads((copied / "model.safetensors.index.json").read_text())["weight_map"][name]
    assert right != other.name
    save_file({**load_file(other), name: torch.zeros(64)}, other, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"'{name}' is in .*{other.name}"):
        load(copied, use_4bit)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    copied = save_tiny_llama(tmp_path / "sharded", max_shard_size="100KB")
    index = copied / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (first, *_), name = sorted(copied.glob("*.safetensors")), "model.norm.weight"
    right = content["weight_map"][name]
    content["weight_map"][name] = first.name
    index.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=rf"index.json says that '{name}' is in {first.name}, but it is in {right}"
    ):
        load(copied)
    content["weight_map"] |= {name: right, "a.stale.entry": right}
    index.write_text(json.dumps(content))
    load(copied)  # transformers would, too


def test_missing_shard(tmp_path: Path) -> None:
    sharded = save_tiny_llama(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        load(sharded)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "inner/a.safetensors"])
def test_index_that_leaves_its_directory(copied: Path, shard: str) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(InputError, match=r"names a shard outside its directory"):
        load(copied)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{}"])
def test_damaged_index(copied: Path, index: str) -> None:
    (copied / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json|missing"):
        load(copied)


# ---- names and configs that do not load -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/directory", "does not exist; check the path"),
        ("./no-such-directory", "does not exist; check the path"),
        ("a/b/c", "does not exist; check the path"),
        ("model.gguf", "does not exist; check the path"),
        ("nobody/no-such-model", "neither a local path nor a model the hub could give"),
        ("no such model", "neither a local path nor a model the hub could give"),
        ("", "neither a local path|does not exist|has no config"),
    ],
)
def test_unknown_model(model: str, message: str) -> None:
    """HF_HUB_OFFLINE is set for the tests: what the hub says then is one sentence too."""
    with pytest.raises(InputError, match=message) as raised:
        load_base_model(model)
    assert "\n" not in str(raised.value)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_file_that_is_no_gguf(llama: Path) -> None:
    with pytest.raises(InputError, match=r"is a file but no \.gguf"):
        load(llama / "model.safetensors")


def test_own_code_is_refused(copied: Path) -> None:
    edit_config(copied, auto_map={"AutoModelForCausalLM": "modeling_mine.Model"})
    for use in (load, lambda path: load_config(str(path))):
        with pytest.raises(InputError, match="brings code of its own to run"):
            use(copied)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "", '{"model_type": "no-such-type"}', "{}", '{"model_type": "llama", "vocab_size": "many"}'],
)
def test_corrupt_config(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load(copied)


def test_no_language_model(copied: Path) -> None:
    """A vision model's config is not a causal language model."""
    from transformers import ViTConfig

    ViTConfig().save_pretrained(copied)
    with pytest.raises(InputError):
        load(copied)


@pytest.mark.parametrize("text", ["{", "[1]", '{"max_new_tokens": "many"}'])
def test_corrupt_generation_config(copied: Path, text: str) -> None:
    """Named, or read without harm; never a traceback."""
    (copied / "generation_config.json").write_text(text)
    try:
        load(copied)
    except InputError as error:
        assert "generation_config.json" in str(error)


def test_generation_config_is_taken_over(copied: Path) -> None:
    """Also one that transformers would refuse to save: a temperature without sampling."""
    text = {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (copied / "generation_config.json").write_text(json.dumps(text))
    assert load(copied).generation_config.eos_token_id == [2, 5]


def test_tokenizer(llama: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(llama)).chat_template == tiny_tokenizer().chat_template
    without = save_tiny_llama(tmp_path / "without")
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(without))


# ---- weights by name, for merging and exporting -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["4bit", "original", "16bit", "prequantized"])
@pytest.mark.parametrize("tied", [True, False])
def test_dequantized_weights(kind: str, tied: bool, prequantized: Path, llama: Path, tmp_path: Path) -> None:
    """Every parameter once, in `weight_shapes`' order; block linears as their 4-bit codes say."""
    if kind == "prequantized":
        source, stored = prequantized, load_file(llama / "model.safetensors")
    else:
        source = save_tiny_llama(tmp_path / "source", tie_word_embeddings=tied)
        stored = load_file(source / "model.safetensors")
    quant = None if kind == "16bit" else QuantConfig()
    weights = dict(dequantized_weights(str(source), quant, original=kind == "original"))
    assert list(weights) == list(weight_shapes(empty_model(str(source))))
    assert weights.keys() == stored.keys()
    num_quantized = 0
    for name, weight in weights.items():
        assert (
            weight.dtype is torch.float32 and tuple(weight.shape) == weight_shapes(empty_model(str(source)))[name]
        )
        if name.removesuffix(".weight").endswith(tuple(LINEARS)) and kind in ("4bit", "prequantized"):
            assert torch.equal(weight, plainly_quantized(stored[name], QuantConfig()))
            num_quantized += 1
        else:
            assert torch.equal(weight, stored[name])
    assert num_quantized == (14 if kind in ("4bit", "prequantized") else 0)


def test_no_original_of_a_prequantized_base(prequantized: Path) -> None:
    with pytest.raises(InputError, match="stored in 4 bits and has no original weights"):
        list(dequantized_weights(str(prequantized), QuantConfig(), original=True))


# ---- GGUF -------------------------------------------------------------------------------------------------


def to_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's rotary order, as its convert_hf_to_gguf.py (LlamaModel.permute) has it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(file: Path, directory: Path, architecture: str = "llama", scaling: str | None = None) -> Path:
    """A .gguf of a saved tiny LLaMA with the tiny tokenizer, in fp32, written as llama.cpp's converter does."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    weights, config = load_file(directory / "model.safetensors"), load_config(str(directory))
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    words = sorted(backend["vocab"], key=backend["vocab"].get)
    words += [f"unused{i}" for i in range(config.vocab_size - len(words))]
    writer = GGUFWriter(str(file), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if scaling is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_eos_token_id(2)
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = to_llama_cpp(array, heads)
        writer.add_tensor(f"{name_map.get_name(name.removesuffix('.weight'))}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_equals_its_source(tmp_path: Path, tied: bool) -> None:
    """The same weights as .gguf and as safetensors give the same 4-bit bytes; rotary order undone."""
    source = save_tiny_llama(tmp_path / "source", tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "model.gguf", source)
    stored = load_file(source / "model.safetensors")
    gguf_source = GGUFSource(file)
    assert gguf_source.names == stored.keys()
    for name, tensor in stored.items():
        assert gguf_source.shape(name) == tuple(tensor.shape)
        assert torch.equal(gguf_source.read(name), tensor)
    q = stored["model.layers.0.self_attn.q_proj.weight"].numpy()
    assert not np.array_equal(to_llama_cpp(q, 4), q)
    expected = logits(load(source))
    for _ in ("fresh", "cached"):
        model = load(file)
        assert_same_tensors(packed_bytes(model), packed_bytes(load(source)))
        assert relative_error(logits(model), expected) < FP32_TOLERANCE
    assert load_tokenizer(str(file)).decode(load_tokenizer(str(file)).encode("hello there")) == "hello there"


@pytest.mark.parametrize("has_settings", [True, False])  # llama.cpp writes the model's into the first part alone
def test_a_part_of_a_gguf_model_is_named(tmp_path: Path, has_settings: bool) -> None:
    """It was called incomplete: "download it again"."""
    from gguf import GGUFWriter

    file = tmp_path / "model-00001-of-00002.gguf"
    writer = GGUFWriter(file, "llama")
    if not has_settings:
        writer.kv_data[0].clear()
    writer.add_uint16("split.no", 0 if has_settings else 1)
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=f"is part {1 if has_settings else 2} of 2; join them"):
        load_base_model(str(file))


@pytest.mark.parametrize("scaling", ["linear", "yarn", "none"])
def test_gguf_with_a_scaled_rotary_embedding(tmp_path: Path, scaling: str) -> None:
    """transformers leaves the scaling out: such a file loaded, and computed other numbers without a word."""
    file = write_gguf(tmp_path / "model.gguf", save_tiny_llama(tmp_path / "source"), scaling=scaling)
    if scaling == "none":
        assert load_base_model(str(file), compute_dtype="float32", cache=False) is not None
    else:
        with pytest.raises(InputError, match="scales its rotary embedding"):
            load_base_model(str(file), compute_dtype="float32", cache=False)


def test_gguf_with_extra_and_missing_tensors(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    edit_weights(source, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        load(write_gguf(tmp_path / "missing.gguf", source))
    source = save_tiny_llama(tmp_path / "source3", num_hidden_layers=3)
    edit_config(source, num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(192, 64)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight is \(192, 64\) but should be \(160, 64\)"):
        load(write_gguf(tmp_path / "misshapen.gguf", source))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.05, 0.5, 0.999])
def test_truncated_gguf(tmp_path: Path, share: float) -> None:
    """Cut in the header, the vocabulary or the data: always the same sentence."""
    file = write_gguf(tmp_path / "model.gguf", save_tiny_llama(tmp_path / "source"))
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(InputError, match=r"model\.gguf .*download it again"):
        load(file)


def test_file_that_is_only_called_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"this is no model" * 100)
    with pytest.raises(InputError, match=r"model\.gguf is not a complete GGUF file"):
        load(tmp_path / "model.gguf")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", save_tiny_llama(tmp_path / "source"), architecture="mamba")
    with pytest.raises(InputError, match=r"holds a mamba model; GGUF bases of llama"):
        load(file)


def test_gguf_without_architecture(tmp_path: Path) -> None:
    """A GGUF file may hold anything (an imatrix, a projector): the field is not always there."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.kv_data[0].clear()
    writer.add_uint32("something.else", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"model\.gguf"):
        load(tmp_path / "model.gguf")


def test_real_gguf_against_transformers(smollm2: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M as Q4_1 blocks: every weight as transformers dequantizes it; embeddings rounded to bf16.

    gguf and transformers spend seconds in Python on the vocabulary each time; here the file is opened once, and
    transformers' model is made without the vocabulary that it has no use for.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    reader = gguf.GGUFReader(smollm2)
    without_vocabulary = copy.copy(reader)
    without_vocabulary.fields = {k: v for k, v in reader.fields.items() if not k.startswith("tokenizer.")}
    path = Path(smollm2)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda *args: without_vocabulary)
        expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args: reader)
    monkeypatch.setenv("QLORA_CACHE", str(own_cache))
    theirs = {name: p.detach() for name, p in expected.named_parameters()}
    source = GGUFSource(path)
    assert source.names == theirs.keys() and len(theirs) > 200
    layers = [name for name in theirs if ".layers.7." in name]
    assert len(layers) == 9
    for name in [*layers, "model.norm.weight", "model.layers.29.self_attn.k_proj.weight"]:
        assert torch.equal(source.read(name), theirs[name]), name

    model = load_base_model(smollm2, compute_dtype="float32")
    embedding = theirs["model.embed_tokens.weight"].to(torch.bfloat16)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        quantized = plainly_quantized(theirs[f"model.layers.7.{part}.weight"], QuantConfig())
        layer = model.get_submodule(f"model.layers.7.{part}")
        assert torch.equal(reference.dense_weight(layer), quantized)


# ---- memory -----------------------------------------------------------------------------------------------

# Peak from /proc: a child's ru_maxrss starts at the peak of the process that started it. "5" resets it (man proc).
MEASURE_LOADING = """
import re, sys
import qlora.model.load
import qlora.model.weights
def memory(name): return 1024 * int(re.search(name + ":(.*) kB", open("/proc/self/status").read())[1])
qlora.model.load.load_base_model(sys.argv[1], compute_dtype="float32")  # libraries, kernels
model = None
for cache in (True, True, False):
    model = None
    before, _ = memory("VmRSS"), open("/proc/self/clear_refs", "w").write("5")
    model = qlora.model.load.load_base_model(sys.argv[2], compute_dtype="float32", cache=cache)
    print(memory("VmHWM") - before)
resident = sum(p.nbytes for p in model.parameters())
print(resident + sum(p.quant_state.absmax.nbytes for p in model.parameters() if hasattr(p, "quant_state")))
"""


def save_large_llama(directory: Path) -> int:
    """A LLaMA of 285 MB in fp32 whose layers share their numbers, and its largest tensor's bytes."""
    from transformers import LlamaForCausalLM

    from tests.models import tiny_llama_config

    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=8)
    config = tiny_llama_config(**sizes, num_hidden_layers=5, vocab_size=4096)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    pool = torch.randn(4096 * 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {name: pool[: shape.numel()].clone().view(shape) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 280e6
    return max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_of_loading(llama: Path, tmp_path: Path) -> None:
    """First start: one full-precision tensor, whatever the model's size; second start: next to nothing; without
    the cache: the 4-bit model and one full-precision tensor.

    The allowance is for temporaries (fp32 to 4 bits, piece by piece) and the libraries' own; malloc, which would
    keep up to 60 MB for later, is told to give back what is freed.
    """
    largest = save_large_llama(tmp_path / "large")
    command = [sys.executable, "-c", MEASURE_LOADING, str(llama), str(tmp_path / "large")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    first, second, without_cache, resident = map(int, result.stdout.split())
    allowance = 16e6
    assert resident > largest + allowance
    assert first < largest + allowance, f"{first / 1e6:.1f} MB to quantize into the cache"
    assert second < allowance, f"{second / 1e6:.1f} MB to map the cache"
    assert without_cache < resident + largest + allowance, f"{without_cache / 1e6:.1f} MB for {resident / 1e6:.1f}"


def mappings(directory: Path) -> list[tuple[range, dict[str, int]]]:
    """(addresses, kB by kind) of every mapping of a file below `directory`, from /proc/self/smaps (man proc)."""
    found: list[tuple[range, dict[str, int]]] = []
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # the line that begins a mapping: addresses, ..., path
            is_ours = rest[-1].startswith(str(directory.resolve()))
            if is_ours:
                start, end = (int(address, 16) for address in first.split("-"))
                found.append((range(start, end), {}))
        elif is_ours and rest[-1] == "kB":
            found[-1][1][first[:-1]] = int(rest[0])
    return found


def bytes_read() -> int:
    """What this process has had read from disks."""
    return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])


def large_tensors(model: Any) -> list[Tensor]:
    """Every parameter and the scales of the 4-bit ones."""
    parameters = list(model.parameters())
    return [p.data for p in parameters] + [p.quant_state.absmax for p in parameters if hasattr(p, "quant_state")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("tied", [True, False])
def test_the_cache_is_mapped_and_never_written_to(tmp_path: Path, fresh_cache: Path, tied: bool) -> None:
    """Nothing of it is copied, on the first start or the second, and a step and a generation leave it clean.

    A write to a mapped weight would copy its page: "Anonymous" counts such pages.
    """
    model = load(save_tiny_llama(tmp_path / "llama", tie_word_embeddings=tied))
    for _ in range(2):
        maps = mappings(fresh_cache)
        tensors = large_tensors(model)
        assert maps and len(tensors) > 30
        assert all(any(tensor.data_ptr() in addresses for addresses, _ in maps) for tensor in tensors)
        inject_lora(model, LoRAConfig(rank=2, target_modules="all-linear"))
        model.train()
        with torch.enable_grad():
            model(IDS).logits.square().mean().backward()
        model.eval()
        logits(model)
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert all(sizes["Anonymous"] == 0 and sizes["Rss"] > 0 for _, sizes in mappings(fresh_cache))
        model = load(tmp_path / "llama")
    with torch.no_grad():  # guard: a write does show
        model.model.embed_tokens.weight[0] = 1
    assert any(sizes["Anonymous"] > 0 for _, sizes in mappings(fresh_cache))


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="reads /proc/self/io")
def test_a_cold_start_reads_the_cache_once(tmp_path: Path, fresh_cache: Path) -> None:
    """Verifying reads all of it, and the first step then none: it waits for the disk no longer than without."""
    wide = save_tiny_llama(tmp_path / "llama", hidden_size=1024, intermediate_size=2816)

    def from_disk() -> tuple[int, int]:
        """Bytes that the start reads, and that then reading all weights does."""
        gc.collect()
        for file in fresh_cache.glob("*/*.safetensors"):
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        counts = [bytes_read()]
        model = load_base_model(str(wide), compute_dtype="bfloat16")  # norms are read for it
        counts.append(bytes_read())
        for tensor in large_tensors(model):
            tensor.view(torch.uint8).sum()
        counts.append(bytes_read())
        return counts[1] - counts[0], counts[2] - counts[1]

    from_disk()  # makes the cache
    size = sum(file.stat().st_size for file in fresh_cache.glob("*/*.safetensors"))
    start, rest = from_disk()
    assert size > 12e6
    if start + rest < size / 2:
        pytest.skip("files stay in memory here")
    assert start + rest < 1.1 * size, f"{start / 1e6:.1f} and {rest / 1e6:.1f} MB of {size / 1e6:.1f}"


def test_the_compute_dtype_is_measured_once(
    llama: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine two measurements may differ; two runs must not."""
    from qlora.model import load as module

    answers = iter([torch.bfloat16, torch.float32])
    real = module.choose_compute_dtype

    def noisy(name: str, device: torch.device, width: int) -> torch.dtype:
        return next(answers) if name == "auto" else real(name, device, width)

    monkeypatch.setattr(module, "choose_compute_dtype", noisy)
    found = [
        base_info(load_base_model(str(llama), compute_dtype="auto", cache=cache)).compute_dtype
        for cache in (False, True, True, False)
    ]
    assert found == [torch.bfloat16, *[torch.float32] * 3]  # what is not to be remembered is measured again


def test_a_hub_id_is_downloaded_once_and_without_second_copies(
    llama: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some repositories hold the weights twice (consolidated.safetensors, onnx/, original/).

    The config is asked for first, without weights; these are then of the same commit.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **patterns: Any) -> str:
        asked.append({"name": name, **patterns})
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert torch.equal(logits(load("owner/hub-test")), logits(load(llama)))
    assert [call.pop("name") for call in asked] == ["owner/hub-test", "owner/hub-test"]
    assert [call.pop("revision", None) for call in asked] == [None, llama.name]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    others = [
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.safetensors",
        "pytorch_model.bin",
    ]
    assert list(filter_repo_objects([*wanted, *others], **asked[1])) == wanted
    without_weights = [name for name in wanted if not name.endswith(".safetensors")]
    assert list(filter_repo_objects([*wanted, *others], **asked[0])) == without_weights
