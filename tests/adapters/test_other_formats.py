"""adapters/other_formats.py: adapters in the layouts of MLX-LM and torchtune compute the same after `import`.

The references below are those tools' own formulas, written out; torchtune's whole network too, for its rotary
embedding is what makes its layout another. (Checked once against MLX-LM 0.32.2 on mlx 0.32.4 and torchtune
0.6.1 themselves: logits within 2e-6, relative.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.load import load_adapter
from qlora.adapters.other_formats import MLX_WEIGHTS, detect_tool, read_foreign_adapter
from qlora.adapters.peft_files import read_adapter
from qlora.cli.exits import run
from qlora.cli.main import main
from qlora.model.hf_config import load_config
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from tests.models import TINY, save_tiny_llama
from tests.reference import relative_error

IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order
RANK, ALPHA = 4, 6.0
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
TORCHTUNE_NAMES = dict(
    zip(MODULES, ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w3", "mlp.w2"),
        strict=True)
)  # fmt: skip
LAYERS = [f"model.layers.{index}.{module}" for index in range(2) for module in MODULES]

Factors = dict[str, tuple[Tensor, Tensor, Tensor]]  # layer -> A (R, I), B (O, R), magnitude (O,)


def round_to_bf16(directory: Path) -> Path:
    """Weights that a 16-bit base holds exactly, so that every tool has the same."""
    state = load_file(directory / "model.safetensors")
    save_file(
        {k: t.bfloat16().float() for k, t in state.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return round_to_bf16(save_tiny_llama(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    directory = tmp_path_factory.mktemp("models") / "qwen2"
    model.save_pretrained(directory)
    return round_to_bf16(directory)


def hf_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def random_factors(model: nn.Module, layers: list[str]) -> Factors:
    """Factors of the size that changes the logits, magnitudes near the weights' row norms."""
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for layer in layers:
        weight = model.get_submodule(layer).weight.detach()
        A = 0.2 * torch.randn(RANK, weight.shape[1], generator=generator)
        B = 0.2 * torch.randn(weight.shape[0], RANK, generator=generator)
        norms = weight.norm(dim=1) * (1 + 0.3 * torch.randn(weight.shape[0], generator=generator))
        factors[layer] = A, B, norms
    return factors


def write(directory: Path, name: str, state: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / name)
    (directory / CONFIG).write_text(json.dumps(settings))
    return directory


# ---- MLX-LM -----------------------------------------------------------------------------------------------


def write_mlx(directory: Path, factors: Factors, dora: bool, **settings: Any) -> Path:
    state = {}
    for layer, (A, B, magnitude) in factors.items():
        state[f"{layer}.lora_a"], state[f"{layer}.lora_b"] = A.T, B.T
        if dora:
            state[f"{layer}.m"] = magnitude
    lora = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.05}
    kind = "dora" if dora else "lora"
    fields = {"model": "org/base", "fine_tune_type": kind, "num_layers": 1, "lora_parameters": lora, "seed": 0}
    return write(directory, MLX_WEIGHTS, state, {**fields, **settings})


class MLXLinear(nn.Module):
    """mlx_lm/tuner/lora.py and dora.py: x times a (I, R) times b (R, O), the scale as it is."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, m: Tensor | None) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.m = linear, a, b, m

    def forward(self, x: Tensor) -> Tensor:
        scale = ALPHA / RANK
        y = x @ self.linear.weight.T + scale * (x @ self.a @ self.b)
        if self.m is not None:
            y = y * self.m / (self.linear.weight + scale * (self.a @ self.b).T).norm(dim=1)
        return y if self.linear.bias is None else y + self.linear.bias


@torch.no_grad()
def mlx_logits(model: Any, factors: Factors, dora: bool) -> Tensor:
    for layer, (A, B, magnitude) in factors.items():
        parent, _, name = layer.rpartition(".")
        adapted = MLXLinear(model.get_submodule(layer), A.T, B.T, magnitude if dora else None)
        setattr(model.get_submodule(parent), name, adapted)
    return model(IDS).logits


# ---- torchtune --------------------------------------------------------------------------------------------


def write_torchtune(directory: Path, factors: Factors, dora: bool) -> Path:
    """Factors by Hugging Face's layer names, their rows in torchtune's order already."""
    state = {}
    for layer, (A, B, magnitude) in factors.items():
        _, _, index, module = layer.split(".", 3)
        name = f"layers.{index}.{TORCHTUNE_NAMES[module]}"
        state[f"{name}.lora_a.weight"], state[f"{name}.lora_b.weight"] = A, B
        if dora:
            state[f"{name}.magnitude"] = magnitude
    targets = sorted({layer.rpartition(".")[2] for layer in factors})
    return write(directory, WEIGHTS, state, {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets})


def to_interleaved(rows: Tensor, heads: int) -> Tensor:
    """torchtune's hf_to_tune: output j of a head's first half goes to 2j, of its second to 2j + 1."""
    moved = torch.empty_like(rows)
    size = len(rows) // heads
    for row in range(len(rows)):
        head, place = divmod(row, size)
        half, j = divmod(place, size // 2)
        moved[head * size + 2 * j + half] = rows[row]
    return moved


@torch.no_grad()
def torchtune_logits(model: Any, factors: Factors, dora: bool) -> Tensor:
    """torchtune's LLaMA on the weights of `model`: neighbouring outputs turned, as complex numbers."""
    config, weights = model.config, {name: p.detach() for name, p in model.named_parameters()}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(IDS.shape[1])[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, size / 2)

    def linear(layer: str, x: Tensor) -> Tensor:
        weight = weights[f"{layer}.weight"]
        if layer.endswith("q_proj"):
            weight = to_interleaved(weight, heads)
        if layer.endswith("k_proj"):
            weight = to_interleaved(weight, kv_heads)
        y = x @ weight.T
        if layer not in factors:
            return y
        A, B, magnitude = factors[layer]
        update = ALPHA / RANK * (x @ A.T @ B.T)
        if not dora:
            return y + update
        scale = magnitude / (weight + ALPHA / RANK * (B @ A)).norm(dim=1)
        return y + (scale - 1) * y + scale * update

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], size // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(x.shape)

    def norm(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] * x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()

    x = weights["model.embed_tokens.weight"][IDS[0]]
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        normed = norm(f"{block}.input_layernorm", x)
        q, k, v = (
            linear(f"{block}.self_attn.{name}_proj", normed).unflatten(-1, (-1, size)) for name in ("q", "k", "v")
        )
        q, k = rotate(q), rotate(k).repeat_interleave(heads // kv_heads, 1)
        v = v.repeat_interleave(heads // kv_heads, 1)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + linear(f"{block}.self_attn.o_proj", attended)
        normed = norm(f"{block}.post_attention_layernorm", x)
        gated = F.silu(linear(f"{block}.mlp.gate_proj", normed)) * linear(f"{block}.mlp.up_proj", normed)
        x = x + linear(f"{block}.mlp.down_proj", gated)
    return (norm("model.norm", x) @ weights["lm_head.weight"].T)[None]


# ---- the same function after the import -------------------------------------------------------------------


def assert_computes(directory: Path, base: Path, expected: Tensor) -> None:
    """Through PEFT and through this project, and not because the adapter does nothing."""
    from peft import PeftModel

    own = load_base_model(str(base), use_4bit=False, compute_dtype="float32", cache=False)
    with torch.no_grad():
        assert relative_error(own(IDS).logits, expected) > 0.1
        theirs = PeftModel.from_pretrained(hf_model(base), str(directory)).eval()
        assert relative_error(theirs(IDS).logits, expected) < FP32_TOLERANCE
        load_adapter(own, directory)
        assert relative_error(own(IDS).logits, expected) < FP32_TOLERANCE


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[7:9]], ids=["all", "two"])
def test_an_mlx_adapter_computes_the_same(llama: Path, tmp_path: Path, layers: list[str], dora: bool) -> None:
    factors = random_factors(hf_model(llama), layers)
    source = write_mlx(tmp_path / "mlx", factors, dora)
    main(["import", str(source), "--output-dir", str(tmp_path / "out"), "--model", str(llama)])
    assert_computes(tmp_path / "out", llama, mlx_logits(hf_model(llama), factors, dora))
    saved = read_adapter(tmp_path / "out")
    assert saved.adapted_layers == sorted(layers)
    assert (saved.config.rank, saved.config.alpha, saved.config.dropout) == (RANK, ALPHA, 0.05)
    assert saved.description["base_model_name_or_path"] == str(llama)


def test_biases_and_an_import_without_the_base(qwen2: Path, tmp_path: Path) -> None:
    factors = random_factors(hf_model(qwen2), LAYERS)
    source = write_mlx(tmp_path / "mlx", factors, dora=True)
    main(["import", str(source), "--output-dir", str(tmp_path / "out")])
    assert_computes(tmp_path / "out", qwen2, mlx_logits(hf_model(qwen2), factors, dora=True))
    assert read_adapter(tmp_path / "out").description["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[7:9]], ids=["all", "two"])
def test_a_torchtune_adapter_computes_the_same(llama: Path, tmp_path: Path, layers: list[str], dora: bool) -> None:
    """Random factors are as good in torchtune's order of rows; only the magnitudes go with the weight's rows."""
    model = hf_model(llama)
    factors = random_factors(model, layers)
    source = write_torchtune(tmp_path / "tune", factors, dora)
    main(["import", str(source), "--output-dir", str(tmp_path / "out"), "--model", str(llama)])
    assert_computes(tmp_path / "out", llama, torchtune_logits(model, factors, dora))


def test_the_reference_of_torchtune_is_the_model(llama: Path) -> None:
    model = hf_model(llama)
    with torch.no_grad():
        assert relative_error(torchtune_logits(model, {}, False), model(IDS).logits) < FP32_TOLERANCE


def test_torchtune_leaves_the_rows_of_qwen2(qwen2: Path, tmp_path: Path) -> None:
    """Its rotary embedding is Hugging Face's there, so that its formula is MLX-LM's."""
    model = hf_model(qwen2)
    factors = random_factors(model, LAYERS)
    source = write_torchtune(tmp_path / "tune", factors, dora=False)
    main(["import", str(source), "--output-dir", str(tmp_path / "out"), "--model", str(qwen2)])
    assert_computes(tmp_path / "out", qwen2, mlx_logits(model, factors, dora=False))


# ---- whose it is ------------------------------------------------------------------------------------------


def test_each_format_is_detected(llama: Path, tmp_path: Path) -> None:
    factors = random_factors(hf_model(llama), LAYERS[:1])
    mlx = write_mlx(tmp_path / "mlx", factors, dora=False)
    tune = write_torchtune(tmp_path / "tune", factors, dora=False)
    main(["import", str(mlx), "--output-dir", str(tmp_path / "peft")])
    assert (detect_tool(mlx), detect_tool(tune), detect_tool(tmp_path / "peft")) == ("MLX-LM", "torchtune", None)
    (tmp_path / "pickle").mkdir()
    assert detect_tool(tmp_path / "pickle") is None and detect_tool(tmp_path / "nowhere") is None
    (tmp_path / "pickle" / "adapter_model.pt").touch()
    assert detect_tool(tmp_path / "pickle") == "torchtune"
    (tmp_path / "pickle" / WEIGHTS).write_bytes(b"no safetensors")
    assert detect_tool(tmp_path / "pickle") is None


# ---- bad input --------------------------------------------------------------------------------------------


def edit_settings(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        settings = json.loads((directory / CONFIG).read_text())
        change(settings)
        (directory / CONFIG).write_text(json.dumps(settings))

    return edit


def lora(**values: Any) -> Callable[[Path], None]:
    return edit_settings(lambda settings: settings["lora_parameters"].update(values))


def edit_state(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        name = MLX_WEIGHTS if (directory / MLX_WEIGHTS).exists() else WEIGHTS
        state = load_file(directory / name)
        change(state)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / name)

    return edit


def put(key: str, tensor: Tensor) -> Callable[[Path], None]:
    return edit_state(lambda state: state.update({key: tensor}))


def refused(argv: list[str], output: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    """One sentence, exit code 2, nothing written."""
    capsys.readouterr()
    assert run(main, ["import", *argv, "--output-dir", str(output)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert not output.exists() and not list(output.parent.glob(".*tmp"))


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
BAD_MLX = {
    "no config": (lambda d: (d / CONFIG).unlink(), "has no adapter_config.json"),
    "no JSON": (lambda d: (d / CONFIG).write_text("{"), "is not readable JSON"),
    "full fine-tune": (edit_settings(lambda s: s.update(fine_tune_type="full")), "holds a full fine-tune"),
    "unknown type": (edit_settings(lambda s: s.update(fine_tune_type="ia3")), "has fine_tune_type = 'ia3'"),
    "no settings": (edit_settings(lambda s: s.update(lora_parameters=None)), "lora_parameters = null"),
    "rank of text": (lora(rank="4"), "has rank = '4', not a whole number of 1 or more"),
    "rank 0": (lora(rank=0), "has rank = 0"),
    "rank true": (lora(rank=True), "has rank = True"),
    "scale 0": (lora(scale=0), "has scale = 0, not a number above 0"),
    "scale NaN": (lora(scale=float("nan")), "has scale = nan"),
    "scale infinite": (lora(scale=float("inf")), "has scale = inf"),
    "no scale": (edit_settings(lambda s: s["lora_parameters"].pop("scale")), "has scale = no value"),
    "dropout 1": (lora(dropout=1), "has dropout = 1"),
    "another rank": (lora(rank=8), f"{Q}.lora_A.weight has the shape (4, 64), not (8, 64)"),
    "mixed ranks": (put(f"{V}.lora_a", torch.ones(64, 2)), f"{V}.lora_A.weight has the shape (2, 64)"),
    "swapped": (put(f"{V}.lora_b", torch.ones(32, 4)), f"{V}.lora_B.weight has the shape (4, 32), not (4, 4)"),
    "NaN": (put(f"{V}.lora_a", torch.full((64, 4), float("nan"))), "holds NaN or infinity"),
    "integers": (put(f"{V}.lora_a", torch.ones(64, 4, dtype=torch.int32)), "is int32, no 16- or 32-bit float"),
    "half": (edit_state(lambda s: s.pop(f"{V}.lora_b")), f"{V} lacks its lora_B"),
    "magnitude too many": (put(f"{V}.m", torch.ones(32)), f"{V} has a magnitude, as only DoRA does"),
    "magnitude missing": (edit_settings(lambda s: s.update(fine_tune_type="dora")), "lacks its lora_magnitude"),
    "whole weight": (put(f"{V}.weight", torch.ones(32, 64)), f"{V}.weight is not a LoRA tensor"),
    "embedding": (put("model.embed_tokens.lora_a", torch.ones(9, 4)), "model.embed_tokens.lora_a is not a LoRA"),
    "experts": (put(f"{V}.lora_a", torch.ones(3, 4, 64)), "has the shape (3, 4, 64), which a linear layer's"),
    "empty": (put(f"{V}.lora_a", torch.ones(0, 4)), "which a linear layer's cannot have"),
    "nothing": (edit_state(lambda s: s.clear()), "does not hold a LoRA adapter of rank 4: nothing"),
    "terminal codes": (put("\x1b[2J.lora_a", torch.ones(64, 4)), "the file is not to be trusted"),
    "truncated": (
        lambda d: (d / MLX_WEIGHTS).write_bytes((d / MLX_WEIGHTS).read_bytes()[:-9]),
        "is not a complete safetensors file",
    ),
    "other base": (
        edit_state(lambda s: [s.update({k.replace("layers.0", "layers.7"): s.pop(k)}) for k in list(s)]),
        "model.layers.7.self_attn.q_proj is not a linear layer of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MLX)
def test_a_bad_mlx_adapter_is_one_sentence(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_mlx(tmp_path / "mlx", random_factors(hf_model(llama), [Q, V]), dora=False)
    damage, message = BAD_MLX[name]
    damage(source)
    refused([str(source), "--model", str(llama)], tmp_path / "out", capsys, message)


TUNE_V = "layers.0.attn.v_proj"
BAD_TORCHTUNE = {
    "no config": (lambda d: (d / CONFIG).unlink(), 'with "r" and "lora_alpha"'),
    "no rank": (edit_settings(lambda s: s.pop("r")), "has r = no value, not a whole number"),
    "alpha of text": (edit_settings(lambda s: s.update(lora_alpha="6")), "has lora_alpha = '6'"),
    "unknown layer": (put("layers.0.attn.w9.lora_a.weight", torch.ones(4, 64)), "attn.w9.lora_a.weight is no"),
    "output head": (put("output.lora_a.weight", torch.ones(4, 64)), "output.lora_a.weight is not a LoRA tensor"),
    "NaN": (put(f"{TUNE_V}.lora_b.weight", torch.full((32, 4), float("inf"))), "holds NaN or infinity"),
    "one magnitude": (put(f"{TUNE_V}.magnitude", torch.ones(32)), f"{Q} lacks its lora_magnitude_vector"),
    "other heads": (put("layers.0.attn.q_proj.lora_b.weight", torch.ones(48, 4)), "has 48 rows for"),
    "other width": (put(f"{TUNE_V}.lora_a.weight", torch.ones(4, 48)), "was made for another base"),
    "pickle": (
        lambda d: (d / WEIGHTS).rename(d / "adapter_model.pt"),
        "is a pickle, which can run code and is never loaded here",
    ),
    "PEFT's": (
        edit_state(lambda s: [s.update({f"base_model.model.{k}": s.pop(k)}) for k in list(s)]),
        "holds no adapter of MLX-LM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TORCHTUNE)
def test_a_bad_torchtune_adapter_is_one_sentence(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_torchtune(tmp_path / "tune", random_factors(hf_model(llama), [Q, V]), dora=False)
    damage, message = BAD_TORCHTUNE[name]
    damage(source)
    refused([str(source), "--model", str(llama)], tmp_path / "out", capsys, message)


def test_torchtune_needs_a_base_whose_layout_is_known(
    llama: Path, qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_torchtune(tmp_path / "tune", random_factors(hf_model(llama), [Q, V]), dora=True)
    refused([str(source)], tmp_path / "out", capsys, "whose layout depends on its base; pass --model.")
    biased = "which has a bias: torchtune scales that too"
    refused([str(source), "--model", str(qwen2)], tmp_path / "out", capsys, biased)
    config = load_config(str(llama))
    config.model_type = "phi3"
    with pytest.raises(InputError, match="is a phi3 model; torchtune adapters of llama, "):
        read_foreign_adapter(source, model_config=config)


def test_nothing_is_overwritten(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_mlx(tmp_path / "mlx", random_factors(hf_model(llama), [Q]), dora=False)
    output = tmp_path / "out"
    output.mkdir()
    main(["import", str(source), "--output-dir", str(output)])  # an empty directory is as good as none
    assert sorted(path.name for path in output.iterdir()) == [CONFIG, WEIGHTS]
    before = (output / WEIGHTS).read_bytes()
    source = write_mlx(tmp_path / "other", random_factors(hf_model(llama), [V]), dora=False)
    for taken in (output, output / WEIGHTS):
        assert run(main, ["import", str(source), "--output-dir", str(taken)]) == 2
        assert "exists already" in capsys.readouterr().err
    assert (output / WEIGHTS).read_bytes() == before
    assert run(main, ["import", str(source)]) == 2
    assert "pass --output-dir" in capsys.readouterr().err


def test_a_foreign_adapter_is_named_by_its_tool_where_it_is_to_be_used(tmp_path: Path, llama: Path) -> None:
    factors = random_factors(hf_model(llama), [Q])
    for tool, write in (("MLX-LM", write_mlx), ("torchtune", write_torchtune)):
        source = write(tmp_path / tool, factors, False)
        with pytest.raises(
            InputError, match=f"in {tool}'s own format; turn it into PEFT's by python -m qlora import"
        ):
            read_adapter(source)
