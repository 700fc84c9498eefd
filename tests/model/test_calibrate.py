"""model/calibrate.py: codes chosen by what layers compute, against a slow reference; files, failures, restarts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.data.example import Example
from qlora.model import calibrate as module
from qlora.model.cache import cached_base, find_source
from qlora.model.calibrate import Calibration, calibrate_base, choose_texts
from qlora.model.load import load_base_model
from qlora.model.shards import layout_of
from qlora.model.weights import dequantized_weights, read_packed_weight, read_weights
from qlora.quant.gptq import Feedback, choose_codes
from qlora.quant.layers import Linear4bit
from qlora.quant.storage import packed_tensors
from qlora.quant.weight import QuantConfig, dequantize_weight
from qlora.system.errors import InputError
from tests.models import save_tiny_llama


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaMA whose embeddings are correlated, as hidden states of trained models are."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("model") / "llama")
    weights, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(3)
    table = weights["model.embed_tokens.weight"]
    few = torch.randn(len(table), 6, generator=generator) @ torch.randn(6, table.shape[1], generator=generator)
    noise = 0.1 * torch.randn(table.shape, generator=generator)
    weights["model.embed_tokens.weight"] = 0.15 * (few / 6**0.5 + noise)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


@pytest.fixture(scope="module")
def rows(llama: str) -> list[Example]:
    """Rows of differing lengths that the original model wrote, which therefore knows them best."""
    network = load(llama, use_4bit=False)
    torch.manual_seed(0)
    ids = torch.randint(260, (48, 1))
    with torch.inference_mode():
        for _ in range(64):
            logits = network(input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    written = [row[: 65 - place % 7] for place, row in enumerate(ids)]
    return [Example(row[:-1], row[1:]) for row in written]


def load(model: str, *options: Any, **more: Any) -> Any:
    return load_base_model(model, *options, **more, compute_dtype="float32")


def calibrate(model: str, rows: list[Example], **options: Any) -> tuple[QuantConfig, Calibration]:
    return calibrate_base(model, rows, compute_dtype="float32", **options)


def layers_of(network: Any) -> dict[str, Linear4bit]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, Linear4bit)}


def codes_of(model: str, quant: QuantConfig) -> dict[str, Tensor]:
    return {name: layer.weight.data.clone() for name, layer in layers_of(load(model, True, quant)).items()}


def divergence(network: Any, dense: Any, rows: list[Example]) -> float:
    """KL from the original model, per token."""
    total = count = 0.0
    with torch.inference_mode():
        for row in rows:
            p, q = (model(input_ids=row.input_ids[None]).logits.log_softmax(-1) for model in (dense, network))
            total += float((p.exp() * (p - q)).sum())
            count += len(row)
    return total / count


def slow_reference(model: str, seen: list[Example], unseen: list[Example]) -> dict[str, Tensor]:
    """Layer after layer: all texts run through the whole network, one at a time, to get this layer's inputs."""
    network = load(model, True, QuantConfig())
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = layers_of(network)
    names = sorted(layers, key=lambda name: (int(name.split(".")[2]), order.index(name.rpartition(".")[2])))
    weights = dict(read_weights(model, names))
    inputs_before: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name.rpartition(".")[2])
        if shared is None:  # q, k and v are rounded together, and so are gate and up
            inputs_before[name] = (inputs(network, layers[name], seen), inputs(network, layers[name], unseen))
        own, other = inputs_before[name if shared is None else f"{name.rpartition('.')[0]}.{shared}"]
        feedback = Feedback.of(own.T @ own / len(own), module.DAMPING)
        chosen = choose_codes(weights[name], layers[name].weight, feedback, other)
        if chosen is not None:
            module.set_codes(layers[name], chosen)
    return {name: layer.weight.data.clone() for name, layer in layers.items()}


def inputs(network: Any, layer: Linear4bit, rows: list[Example]) -> Tensor:
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda layer, args: found.append(args[0].flatten(0, -2).clone()))
    with torch.inference_mode():
        for row in rows:
            network(input_ids=row.input_ids[None])
    handle.remove()
    return torch.cat(found)


def calibrated_in(cache: Path) -> Path:
    """The one calibrated base in the cache."""
    (found,) = [path for path in cache.glob("base-*") if "qlora_calibration" in (path / "config.json").read_text()]
    return found


def split(rows: list[Example]) -> tuple[list[Example], list[Example]]:
    return [row for place, row in enumerate(rows) if place % 8 != 7], rows[7::8]


# ---- the codes --------------------------------------------------------------------------------------------


def test_against_the_slow_reference(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    """Packed, block by block and with shared moments: the same codes, but for near ties of rounding."""
    quant, found = calibrate(llama, rows)
    actual, nearest = codes_of(llama, quant), codes_of(llama, QuantConfig())
    expected = slow_reference(llama, *split(rows))
    assert actual.keys() == expected.keys()
    same = torch.cat([(actual[name] == expected[name]).flatten() for name in actual]).double().mean()
    changed = torch.cat([(actual[name] != nearest[name]).flatten() for name in actual]).double().mean()
    assert same > 0.98 and changed > 0.3
    assert found.num_kept == sum(torch.equal(actual[name], nearest[name]) for name in actual)


def test_the_base_comes_closer_to_the_original(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    """On rows that it has not seen, by more than three quarters; bits and shapes stay."""
    quant, found = calibrate(llama, rows)
    plain, better, dense = load(llama), load(llama, True, quant), load(llama, use_4bit=False)
    unseen = split(rows)[1]
    assert divergence(better, dense, unseen) < 0.25 * divergence(plain, dense, unseen)
    assert found.after < found.before
    assert better.base_info.quantization == quant and quant.calibration == found.id
    for name, layer in layers_of(plain).items():
        old, new = packed_tensors(layer.weight), packed_tensors(layers_of(better)[name].weight)
        assert layout_of(old) == layout_of(new)


def test_a_layer_that_gains_nothing_keeps_the_nearest_codes(
    llama: str, rows: list[Example], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen on one token repeated, judged on the rows: worse there, so it is kept out, and the whole refused."""
    monkeypatch.setattr(module, "DAMPING", 1e-6)
    monkeypatch.setattr("qlora.quant.gptq.FACTORS", (1.0,))
    same = [Example(torch.full((120,), 7), torch.full((120,), 7)) for _ in range(28)]
    mixed = [row for four in range(4) for row in (*same[7 * four : 7 * four + 7], rows[four])]
    with pytest.raises(InputError, match="no better than the nearest"):
        calibrate(llama, mixed)
    found = json.loads((calibrated_in(fresh_cache) / "config.json").read_text())["qlora_calibration"]
    assert 10 <= found["num_kept"] < found["num_layers"] == 14


SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=320, num_attention_heads=4)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=128),
    "qwen3_moe": SIZES
    | dict(num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "gemma3_text": SIZES
    | dict(
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families(kind: str, rows: list[Example], tmp_path: Path, fresh_cache: Path) -> None:
    """Conv1D; a mixture, whose experts keep their codes; attention and rotary embedding that differ by layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = str(tmp_path / kind)
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]))
    for parameter in original.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    original.save_pretrained(model)
    dense, network = load(model, use_4bit=False), load(model)
    before, (seen, unseen) = divergence(network, dense, rows[7::8]), split(rows)
    codes, num_kept = module._choose_all(
        network, model, seen, unseen, tmp_path / "parts", lambda done, total: None
    )
    assert set(codes) == {f"{name}.weight" for name in layers_of(network)}
    assert num_kept < len(codes) / 2
    assert divergence(network, dense, unseen) < 0.9 * before


# ---- files ------------------------------------------------------------------------------------------------


def test_interrupted_it_continues(
    llama: str, rows: list[Example], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first block: that block is not done again, and the result is the same."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, rows, progress=stop)
    done, choose = [], module._choose_block
    monkeypatch.setattr(module, "_choose_block", lambda *args: (done.append(args[1]), choose(*args)))
    quant, _ = calibrate(llama, rows)
    assert done == [1]
    continued = codes_of(llama, quant)
    assert not list(fresh_cache.glob("calibrating-*"))
    shutil.rmtree(cached_base(Path(llama), quant))
    calibrate(llama, rows)
    assert done == [1, 0, 1]
    assert_same(codes_of(llama, quant), continued)


def test_a_damaged_part_is_done_again(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    expected = codes_of(llama, calibrate(llama, rows)[0])
    shutil.rmtree(calibrated_in(fresh_cache))

    def damage(done: int, total: int) -> None:
        (part,) = fresh_cache.glob("calibrating-*/0/codes.safetensors")
        content = bytearray(part.read_bytes())
        content[-5] ^= 1
        part.write_bytes(content)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, rows, progress=damage)
    assert_same(codes_of(llama, calibrate(llama, rows)[0]), expected)


def test_found_in_the_cache(
    llama: str, rows: list[Example], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows are not calibrated twice; other rows are another base."""
    first = calibrate(llama, rows)
    monkeypatch.setattr(module, "_choose_all", None)
    assert calibrate(llama, rows) == first
    monkeypatch.undo()
    assert calibrate(llama, rows[:44])[0] != first[0]


def test_without_the_calibrated_base(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    """It is not replaced by the plain one."""
    quant = QuantConfig(calibration="0123456789abcdef")
    for read in (lambda: load(llama, True, quant), lambda: list(dequantized_weights(llama, quant))):
        with pytest.raises(InputError, match="calibration 0123456789abcdef, which is not in"):
            read()
    assert len(list(dequantized_weights(llama, quant, original=True))) > 14


def test_a_split_base_reads_it(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    """FSDP's and tensor parallelism's source of weights: the calibrated one, without writing."""
    quant, _ = calibrate(llama, rows)
    source = find_source(llama, quant, cache=False)
    name = "model.layers.1.mlp.up_proj"
    packed = read_packed_weight(source, f"{name}.weight", torch.device("cpu"))
    assert packed is not None and torch.equal(packed.data, codes_of(llama, quant)[name])


def test_merging_reads_it(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    quant, _ = calibrate(llama, rows)
    weights = dict(dequantized_weights(llama, quant))
    for name, layer in layers_of(load(llama, True, quant)).items():
        assert torch.equal(weights[f"{name}.weight"], dequantize_weight(layer.weight, torch.float32))


def test_wrong_input(llama: str, rows: list[Example], fresh_cache: Path) -> None:
    with pytest.raises(InputError, match=r"1,096 tokens in 20 texts to choose .*; give at least 2,048 in 8 texts"):
        calibrate(llama, rows[:20])
    quant, _ = calibrate(llama, rows)
    with pytest.raises(InputError, match="stored in 4 bits"):
        calibrate(str(cached_base(Path(llama), quant)), rows)


def test_choose_texts(rows: list[Example]) -> None:
    assert choose_texts(rows, 10**9) == rows
    chosen = choose_texts(rows, 700)
    assert chosen == rows[: len(chosen)] and 800 <= sum(map(len, chosen)) < 800 + 65
