"""The published formulas on dense tensors, PEFT's own start, and the same base after every load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qlora.lora.linalg
import train
from examples.orders import write_task
from qlora.adapters.load import load_adapter, with_base_shift
from qlora.adapters.model import LoRAModel
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.export.merge import merge_adapter
from qlora.lora.adapter import activate, inject_lora, lora_layers
from qlora.lora.base_shift import base_shift
from qlora.lora.linalg import split_svd, truncated_svd
from qlora.lora.optimizer import build_optimizer
from qlora.lora.svd_start import initialize_adapter
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.model.weights import read_weights
from qlora.quant import layers as quantize
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system.errors import InputError
from tests.models import save_tiny_llama
from tests.reference import dense_weight, dequantize, relative_error
from tests.tiny import tiny_tokenizer

IDS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(5))
STARTS = {  # name -> settings of a start that changes the base
    "pissa": {"init": "pissa"},
    "loftq": {"init": "loftq", "loftq_iterations": 3},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stored in bf16, as models are: then no rounding lies between the file and a 16-bit base."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=tiny_tokenizer())
    tensors = load_file(directory / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def load(model: str, use_4bit: bool = True) -> Any:
    return load_base_model(model, use_4bit, compute_dtype="float32", cache=False)


def started(model: str, use_4bit: bool = True, **settings: Any) -> tuple[Any, LoRAConfig]:
    """A base with a fresh adapter of rank 8 on q, v and down_proj, in fp32 unless the settings say otherwise."""
    common = {"target_modules": "q_proj,v_proj,down_proj", "adapter_dtype": "float32", "alpha": 24.0}
    config = LoRAConfig(**{**common, **settings})
    network = load(model, use_4bit)
    inject_lora(network, config)
    initialize_adapter(network, config)
    freeze_base(network)
    return network, config


def learn(network: Any, steps: int = 3) -> None:
    optimizer = build_optimizer(lora_parameters(network), "adamw")
    for _ in range(steps):
        logits = network(input_ids=IDS).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step(3e-3)
        optimizer.zero_grad()


@torch.no_grad()
def logits(network: Any) -> Tensor:
    return network.eval()(input_ids=IDS).logits


def largest_part(matrix: Tensor, rank: int) -> Tensor:
    """The part of the `rank` largest singular values, by torch's own decomposition in fp64."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).float()


def quantized(weight: Tensor) -> Tensor:
    """The values of a weight's 4-bit codes: codes by our quantizer (test_quantize.py), values by the reference."""
    return dequantize(quantize_weight(weight, QuantConfig()))


# ---- the decomposition ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(520, 600), (600, 520)])
def test_truncated_svd_equals_the_whole_one(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gaussian matrix, whose singular values lie close, with a few large ones on top, as weights have.

    A triplet is right to 1e-5; the gap to the next value, a few percent, divides that.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    large = torch.randn(shape[0], 6, generator=generator) @ torch.randn(6, shape[1], generator=generator)
    matrix = noise + 0.3 * large
    with monkeypatch.context() as patch:
        patch.setattr(qlora.lora.linalg, "_whole_svd", None)  # it is not to be called
        U, S, Vh = truncated_svd(matrix, 8)
    expected = torch.linalg.svdvals(matrix.double())[:8]
    assert ((S - expected).abs() / expected).max() < 1e-5
    assert relative_error((U * S) @ Vh, largest_part(matrix, 8)) < 1e-3
    assert relative_error(U.T @ U, torch.eye(8)) < 1e-4 and relative_error(Vh @ Vh.T, torch.eye(8)) < 1e-5
    again = truncated_svd(matrix, 8)
    assert all(torch.equal(a, b) for a, b in zip((U, S, Vh), again, strict=True))


def test_a_matrix_that_converges_slowly_is_decomposed_whole() -> None:
    """An orthogonal matrix has no largest singular value: every iteration ends as it began."""
    matrix = torch.linalg.qr(torch.randn(600, 600, generator=torch.Generator().manual_seed(0)))[0]
    U, S, Vh = truncated_svd(matrix, 4)
    assert (S - 1).abs().max() < 1e-5 and relative_error(matrix.T @ U, Vh.T) < 1e-4


def test_singular_values_are_split_evenly() -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    A, B = split_svd(matrix, 4, scaling=2.5)
    assert relative_error(2.5 * B @ A, largest_part(matrix, 4)) < 1e-5
    assert relative_error(A.norm(dim=1), B.norm(dim=0)) < 1e-6


# ---- the published formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize(("use_4bit", "use_rslora"), [(True, False), (False, True)])
def test_pissa_takes_the_principal_part_out_of_the_base(llama: str, use_4bit: bool, use_rslora: bool) -> None:
    network, _ = started(llama, use_4bit, init="pissa", use_rslora=use_rslora)
    plain = load(llama, use_4bit)
    originals = dict(read_weights(llama, lora_layers(network)))
    assert len(originals) == 6
    for name, layer in lora_layers(network).items():
        W, base = originals[name], dense_weight(layer.base_layer)
        principal = largest_part(W, 8)
        assert (
            relative_error(layer.weights.delta_weight(), principal) < 1e-4
        )  # fp32 / the gap between singular values
        residual = W - principal
        expected = quantized(residual) if use_4bit else residual.bfloat16().float()
        # a value at the edge between two codes, or two bf16 numbers, may fall on the other side
        assert ((base - expected).abs() > 1e-6).float().mean() < 1e-2
        whole = base + layer.weights.delta_weight()
        before = (W - dense_weight(plain.get_submodule(name))).norm()
        if use_4bit:
            assert (W - whole).norm() < 0.97 * before, "QPiSSA quantizes a smaller matrix"
        else:
            assert relative_error(whole, W) < 2**-8  # bf16 rounds the residual


@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_equals_its_algorithm(llama: str, iterations: int) -> None:
    """Algorithm 1 written out; every round ends nearer to W than quantizing alone, and the last nearest."""
    network, _ = started(llama, init="loftq", loftq_iterations=iterations)
    plain = load(llama)
    for name, W in read_weights(llama, lora_layers(network)):
        low_rank, errors = torch.zeros_like(W), []
        for _ in range(iterations):
            Q = quantized(W - low_rank)
            low_rank = largest_part(W - Q, 8)
            errors.append((W - Q - low_rank).norm())
        layer = lora_layers(network)[name]
        assert ((dense_weight(layer.base_layer) - Q).abs() > 1e-6).float().mean() < 5e-3
        assert (
            relative_error(layer.weights.delta_weight(), low_rank) < 0.05
        )  # a code on the other side moves the rest
        error = (W - dense_weight(layer.base_layer) - layer.weights.delta_weight()).norm()
        assert abs(error / errors[-1] - 1) < 1e-3
        assert error < 0.9 * (W - quantized(W)).norm()
        if iterations == 1:
            assert torch.equal(layer.base_layer.weight, plain.get_submodule(name).weight)
            assert relative_error(layer.weights.delta_weight(), low_rank) < 1e-4
        else:
            assert errors[-1] < errors[0]
    assert bool(base_shift(network)) == (iterations > 1)


def test_a_bf16_adapter_starts_at_its_rounding(llama: str) -> None:
    network, _ = started(llama, init="pissa", adapter_dtype="bfloat16")
    exact, _ = started(llama, init="pissa")
    for name, layer in lora_layers(network).items():
        other = lora_layers(exact)[name]
        assert layer.weights.lora_A.dtype == torch.bfloat16 and torch.equal(
            layer.weights.lora_A, other.weights.lora_A.bfloat16()
        )
        assert torch.equal(layer.base_layer.weight, other.base_layer.weight)


@pytest.mark.parametrize("settings", [STARTS["pissa"], {"init": "loftq"}])
def test_dora_starts_with_the_norms_of_the_changed_weights(llama: str, settings: dict[str, Any]) -> None:
    """c = 1 at the start: the outputs are those without DoRA."""
    with_dora, _ = started(llama, **settings, use_dora=True)
    without, _ = started(llama, **settings)
    for name, layer in lora_layers(with_dora).items():
        whole = dense_weight(layer.base_layer) + layer.weights.delta_weight()
        assert relative_error(layer.weights.magnitude.detach(), whole.norm(dim=1)) < 1e-6, name
    assert relative_error(logits(with_dora), logits(without)) < 1e-5


# ---- saved, loaded, resumed, merged -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use_4bit", "settings"),
    [
        (True, STARTS["pissa"]),
        (False, STARTS["pissa"]),
        (True, STARTS["loftq"]),
        (True, {"init": "loftq"}),
        (True, {**STARTS["pissa"], "use_dora": True}),
    ],
)
def test_a_loaded_adapter_finds_its_base_again(
    llama: str, tmp_path: Path, use_4bit: bool, settings: dict[str, Any]
) -> None:
    """Bit for bit: logits, and what is saved once more. Twice the file where the base is shifted, or none."""
    network, config = started(llama, use_4bit, **settings)
    learn(network)
    save_adapter(network, tmp_path / "a", config, llama)
    again = load(llama, use_4bit)
    assert not torch.equal(logits(again), logits(network))
    loaded = load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(network))
    save_adapter(again, tmp_path / "b", loaded, llama)
    shifted = "loftq_iterations" in settings or settings["init"] == "pissa"
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert ("base_shift.safetensors" in names) == shifted
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_conv1d_too(tmp_path: Path) -> None:
    """GPT-2's weights lie transposed, in files and in a 16-bit base."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def upright(layer: Any) -> Tensor:
        return quantize.dense_weight(layer, torch.float32)

    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "gpt2")
    model = str(tmp_path / "gpt2")
    for use_4bit in (True, False):
        network, config = started(model, use_4bit, init="pissa", target_modules="c_attn")
        (layer,) = lora_layers(network).values()
        ((name, W),) = read_weights(model, lora_layers(network))
        assert W.shape == (192, 64)
        plain = load(model, use_4bit).get_submodule(name)
        whole = upright(layer.base_layer) + layer.weights.delta_weight()
        assert (W - whole).norm() < (0.97 if use_4bit else 1.01) * (W - upright(plain)).norm()
        learn(network)
        save_adapter(network, tmp_path / str(use_4bit), config, model)
        again = load(model, use_4bit)
        load_adapter(again, tmp_path / str(use_4bit))
        assert torch.equal(logits(again), logits(network))
        merge_adapter(
            model, str(tmp_path / str(use_4bit)), str(tmp_path / f"merged-{use_4bit}"), MergeOptions(drift=False)
        )
        merged = load(str(tmp_path / f"merged-{use_4bit}"), use_4bit=False)
        assert relative_error(logits(merged), logits(network)) < 0.02


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_merged_onto_the_base_it_was_trained_on(llama: str, tmp_path: Path, name: str, base: Any) -> None:
    """bf16(base + s B A), where the base is q(W - s B' A'), or that before quantization."""
    network, config = started(llama, **STARTS[name])
    learn(network)
    save_adapter(network, tmp_path / "adapter", config, llama)
    merge_adapter(llama, str(tmp_path / "adapter"), str(tmp_path / "merged"), MergeOptions(base=base, drift=False))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for layer_name, W in read_weights(llama, lora_layers(network)):
        layer = lora_layers(network)[layer_name]
        A, B = base_shift(network)[layer_name]
        onto = W - B @ A if base == "original" else dense_weight(layer.base_layer)
        expected = (onto + layer.weights.delta_weight()).bfloat16()
        # another order of fp32 additions may round to the neighbour
        assert (written[f"{layer_name}.weight"] != expected).float().mean() < 1e-3
        assert relative_error(written[f"{layer_name}.weight"], expected) < 1e-4
    if base == "dequantized":
        assert relative_error(logits(load(str(tmp_path / "merged"), use_4bit=False)), logits(network)) < 0.02


@pytest.mark.parametrize("name", STARTS)
def test_a_resumed_run_equals_an_uninterrupted_one(llama: str, tmp_path: Path, name: str) -> None:
    data = write_task(tmp_path / "orders", num_train=12, num_test=1)[0]
    flags = ["--model", llama, "--data", str(data), "--max-length", "256", "--batch-size", "2", "--max-steps", "4"]
    flags += ["--compute-dtype", "float32", "--save-every", "2", "--init", name, "--loftq-iterations", "2"]
    flags += ["--lora-plus-ratio", "4"]
    train.main([*flags, "--output-dir", str(tmp_path / "whole")])
    train.main([*flags, "--output-dir", str(tmp_path / "parts")])
    for step in ("step-000004",):
        for file in (tmp_path / "parts" / "checkpoints" / step).iterdir():
            file.unlink()
        (tmp_path / "parts" / "checkpoints" / step).rmdir()
    for file in ("adapter_model.safetensors", "base_shift.safetensors"):
        (tmp_path / "parts" / file).unlink()
    train.main([*flags, "--output-dir", str(tmp_path / "parts"), "--resume", "auto"])
    for file in ("adapter_model.safetensors", "base_shift.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    first = load_file(tmp_path / "whole" / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    assert not any(torch.equal(tensors[key], first[key]) for key in tensors)


# ---- what does not go together ----------------------------------------------------------------------------


def test_a_changed_base_serves_one_adapter_alone(llama: str, tmp_path: Path) -> None:
    network, config = started(llama, **STARTS["pissa"])
    save_adapter(network, tmp_path / "pissa", config, llama)
    plain, plain_config = started(llama)
    save_adapter(plain, tmp_path / "plain", plain_config, llama)
    other, other_config = started(llama, **STARTS["loftq"])
    save_adapter(other, tmp_path / "other", other_config, llama)
    before = logits(network)
    for name in ("plain", "other"):
        with pytest.raises(InputError, match="The base was changed"):
            load_adapter(network, tmp_path / name)
    with pytest.raises(InputError, match="The base was changed"):
        activate(network, None)
    assert torch.equal(logits(network), before)
    load_adapter(network, tmp_path / "pissa")  # its own
    before = logits(plain)
    with pytest.raises(InputError, match="shares it with no other"):
        load_adapter(plain, tmp_path / "pissa")
    assert torch.equal(logits(plain), before) and not base_shift(plain)
    several = LoRAModel(load(llama), plain_config)
    with pytest.raises(InputError, match="shares it with no other"):
        several.load_adapter(tmp_path / "pissa", "second")
    with pytest.raises(InputError, match="that a LoRAModel is made with"):
        several.add_adapter("second", config)
    with pytest.raises(InputError, match="as_plain_lora"):
        read_adapter(tmp_path / "pissa").low_rank("model.layers.0.self_attn.q_proj")


def test_a_lora_model_starts_and_loads_so_too(llama: str, tmp_path: Path) -> None:
    config = LoRAConfig(init="pissa")
    model = LoRAModel(load(llama), config)
    assert base_shift(model.model)
    model.save(tmp_path)
    again = LoRAModel(load(llama))
    again.load_adapter(tmp_path, "mine")
    again.set_adapter("mine")
    assert torch.equal(logits(again.model), logits(model.model))


def test_bases_without_an_original(llama: str, tmp_path: Path) -> None:
    """From 4-bit files PiSSA starts from what the codes stand for; LoftQ has no error to fit."""
    load_base_model(llama, compute_dtype="float32")
    from qlora.system.cache import cache_directory

    stored = str(max(cache_directory().glob("base-*"), key=lambda p: p.stat().st_mtime))
    network, config = started(stored, **STARTS["pissa"])
    plain = load(stored)
    for name, layer in lora_layers(network).items():
        W = dense_weight(plain.get_submodule(name))
        assert relative_error(layer.weights.delta_weight(), largest_part(W, 8)) < 1e-4
    learn(network)
    save_adapter(network, tmp_path, config, stored)
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(network))
    with pytest.raises(InputError, match="in 4 bits only"):
        started(stored, init="loftq")
    with pytest.raises(InputError, match="in 16 bits"):
        started(llama, use_4bit=False, init="loftq")
    with pytest.raises(InputError, match="singular values"):
        started(llama, init="pissa", rank=65)


def test_a_damaged_base_shift_is_refused(llama: str, tmp_path: Path) -> None:
    network, config = started(llama, **STARTS["pissa"])
    save_adapter(network, tmp_path, config, llama)
    file = tmp_path / "base_shift.safetensors"
    whole = load_file(file)
    key = min(whole)
    damaged = {
        "NaN": {**whole, key: torch.full_like(whole[key], torch.nan)},
        "no pair": {k: t for k, t in whole.items() if k != key},
        "but here it is": {**whole, key: whole[key][:, :-1].contiguous()},
        "holds x among": {**whole, "base_model.model.x": torch.zeros(2)},
    }
    fresh = load(llama)
    before = logits(fresh)
    for message, tensors in damaged.items():
        save_file(tensors, file)
        with pytest.raises(InputError, match=message):
            load_adapter(fresh, tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), before) and not lora_layers(fresh)


# ---- PEFT -------------------------------------------------------------------------------------------------


def peft_base(model: str) -> Any:
    """transformers' model in fp32 with the weights of the file, which are bf16 numbers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def test_pissa_equals_pefts(llama: str, tmp_path: Path) -> None:
    """Same start; ours loads in PEFT, which finds the shift by another SVD; PEFT's, without the shift, loads here.

    PEFT's residual stays in fp32 here while ours is rounded to bf16, 2^-9 of it; compared with a residual of
    ours in fp32 the logits agree to fp32's rounding.
    """
    import peft

    targets = ["q_proj", "v_proj", "down_proj"]
    options = {"r": 8, "lora_alpha": 24, "target_modules": targets, "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(peft_base(llama), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    network, config = started(llama, use_4bit=False, init="pissa")
    modules = dict(theirs.named_modules())
    for name, layer in lora_layers(network).items():
        module = modules[f"base_model.model.{name}"]
        assert relative_error(layer.weights.delta_weight(), module.get_delta_weight("default").detach()) < 1e-5
        rounded = module.base_layer.weight.detach().bfloat16()
        assert (layer.base_layer.weight != rounded).float().mean() < 0.01
    learn(network)
    save_adapter(network, tmp_path / "ours", config, llama)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    in_peft = peft.PeftModel.from_pretrained(peft_base(llama), str(tmp_path / "ours")).eval()
    # Our base in fp32: what rounding to bf16 took from it is put back.
    for name, W in read_weights(llama, lora_layers(network)):
        A, B = base_shift(network)[name]
        lora_layers(network)[name].base_layer.weight.data = W - B @ A
    assert relative_error(logits(network), logits(in_peft)) < 1e-5

    trainable = peft.PeftModel.from_pretrained(peft_base(llama), str(tmp_path / "ours"), is_trainable=True)
    for parameter in (p for p in trainable.parameters() if p.requires_grad):
        parameter.data.mul_(1.1)
    trainable.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "base_shift.safetensors").exists()
    here = load(llama, use_4bit=False)
    load_adapter(here, tmp_path / "theirs")
    for name, W in read_weights(llama, lora_layers(here)):
        A, B = base_shift(here)[name]
        lora_layers(here)[name].base_layer.weight.data = W - B @ A
    assert relative_error(logits(here), logits(trainable.eval())) < 1e-5


def test_what_peft_makes_of_the_others(llama: str, tmp_path: Path, own_cache: Path) -> None:
    """LoftQ of one round is plain LoRA anywhere; of several it is refused there; and so QPiSSA on a 4-bit base."""
    import peft
    from transformers import AutoModelForCausalLM

    load_base_model(llama, compute_dtype="float32")
    cached = max(own_cache.glob("base-*"), key=lambda p: p.stat().st_mtime)

    for name, settings in {"one": {"init": "loftq"}, **STARTS}.items():
        network, config = started(llama, **settings)
        learn(network)
        save_adapter(network, tmp_path / name, config, llama)
        if name == "one":
            dense = peft_base(llama)  # with the weights that the codes stand for: bitsandbytes' kernel errs at 160
            plain = load(llama)
            for key, module in dense.named_modules():
                if isinstance(module, torch.nn.Linear) and key != "lm_head":
                    module.weight.data = dense_weight(plain.get_submodule(key))
            theirs = peft.PeftModel.from_pretrained(dense, str(tmp_path / name))
            assert relative_error(logits(network), logits(theirs)) < 1e-5
        else:
            with pytest.raises((TypeError, ValueError, ImportError), match=r"PiSSA|loftq_config|scipy"):
                base = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)
                peft.PeftModel.from_pretrained(base, str(tmp_path / name))


def test_loftq_decomposes_as_peft_does() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    residual = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    A, B = split_svd(residual, 8, scaling=1.0)
    theirs = _low_rank_decomposition(residual, reduced_rank=8)
    assert relative_error(B @ A, theirs["L"] @ theirs["R"]) < 1e-5
    assert relative_error(A.abs(), theirs["R"].abs()) < 1e-4  # signs are free in pairs


def test_plain_lora_of_twice_the_rank(llama: str, tmp_path: Path) -> None:
    """On W in full precision it computes what the adapter computes on W - s B' A' in full precision."""
    network, config = started(llama, use_4bit=False, init="pissa", use_rslora=True, rank_pattern="v_proj=4")
    learn(network)
    save_adapter(network, tmp_path / "pissa", config, llama)
    plain = read_adapter(tmp_path / "pissa").as_plain_lora()
    onto = load(llama, use_4bit=False)
    for name, W in read_weights(llama, lora_layers(network)):
        A, B = base_shift(network)[name]
        layer = lora_layers(network)[name]
        layer.base_layer.weight.data = W - B @ A
        low_A, low_B = plain.low_rank(name)
        assert len(low_A) == 2 * layer.weights.rank == plain.config.rank_of(name)
        assert relative_error(W + low_B @ low_A, W - B @ A + layer.weights.delta_weight()) < 1e-6
        onto.get_submodule(name).weight.data = plain.merge_into(f"{name}.weight", W)
    assert relative_error(logits(onto), logits(network)) < 1e-5
    with pytest.raises(InputError, match="with_base_shift"):
        (tmp_path / "pissa" / "base_shift.safetensors").unlink()
        read_adapter(tmp_path / "pissa").as_plain_lora()
    found = with_base_shift(read_adapter(tmp_path / "pissa"), load(llama), llama).as_plain_lora()
    for name in plain.adapted_layers:
        (A, B), (found_A, found_B) = plain.low_rank(name), found.low_rank(name)
        assert relative_error(found_B @ found_A, B @ A) < 1e-5
