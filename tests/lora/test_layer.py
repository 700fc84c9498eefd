"""lora/layer.py: fused against composed and against PEFT; choosing, counting, merging, loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import activate, active_adapter, inject_lora, lora_layers
from qlora.lora.dora import DoRA, weight_norm
from qlora.lora.layer import LoRALinear
from qlora.lora.optimizer import take_gradients
from qlora.lora.state import load_lora_state_dict, lora_state_dict
from qlora.lora.targets import linear_layers, match_targets
from qlora.lora.trainable import (
    base_parameters,
    count_parameters,
    count_trainable_parameters,
    freeze_base,
    lora_parameters,
    merge_lora,
    parameter_summary,
    unfreeze,
    unmerge_lora,
)
from qlora.model.load import load_base_model
from qlora.quant.layers import Linear4bit, Linear16bit
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system.errors import InputError
from tests import reference
from tests.models import save_tiny_llama, tiny_llama_config
from tests.reference import relative_error

FP32_TOLERANCE = 2e-6  # sums of ~100 products, each rounded to 2^-24
BF16_TOLERANCE = 2 * 2**-8  # operands, h, u and the results are rounded to 8 bits; the sums are fp32
ROWS, COLUMNS, RANK = 48, 80, 8


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_base(kind: str, bias: bool = True) -> nn.Module:
    """A frozen (48, 80) layer: 80 is a width that bitsandbytes' CPU kernel gets wrong."""
    from transformers.pytorch_utils import Conv1D

    dense = gaussian(ROWS, COLUMNS, seed=1) * COLUMNS**-0.5
    offset = gaussian(ROWS, seed=2) if bias else None
    if kind == "4bit":
        return Linear4bit(quantize_weight(dense, QuantConfig()), offset)
    if kind == "16bit":
        return Linear16bit(dense.to(torch.bfloat16), offset)
    layer: nn.Module = Conv1D(ROWS, COLUMNS) if kind == "conv1d" else nn.Linear(COLUMNS, ROWS, bias=bias)
    layer.weight.data = dense.T.contiguous() if kind == "conv1d" else dense
    if layer.bias is not None:
        layer.bias.data = gaussian(ROWS, seed=2) if bias else torch.zeros(ROWS)
    return layer.requires_grad_(False)


def make_lora(kind: str, bias: bool = True, dropout: float = 0.0, dtype: Any = torch.bfloat16) -> LoRALinear:
    """A LoRALinear in training mode with B away from zero."""
    base = make_base(kind, bias)
    layer = LoRALinear(base, RANK, 16.0, dropout, dtype, generator=torch.Generator().manual_seed(5)).train()
    layer.weights.lora_B.data = gaussian(ROWS, RANK, seed=6, dtype=dtype)
    return layer


def random_adapters(model: Any, seed: int = 7) -> None:
    """Move every A and B away from its start: a B of zero would hide dA and half of dx."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model):
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def tiny_dense(**overrides: Any) -> Any:
    """A dense fp32 tiny LLaMA with weights large enough that attention and logits matter."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(**overrides))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("lora") / "llama"))


@pytest.fixture
def tiny_4bit(tiny_path: str) -> Any:
    return load_base_model(tiny_path, compute_dtype="float32", cache=False)


# ---- the fused function -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4bit", "16bit", "linear", "conv1d"])
def test_fused_equals_composed(kind: str, dtype: torch.dtype, bias: bool, dropout: float) -> None:
    """Output, dx, dA and dB against autograd through the written-out formula in fp64, same dropout mask."""
    layer = make_lora(kind, bias, dropout, dtype)
    x = gaussian(2, 9, COLUMNS, seed=3, dtype=dtype).requires_grad_()
    dy = gaussian(2, 9, ROWS, seed=4, dtype=dtype)
    torch.manual_seed(11)
    y = layer(x)
    y.backward(dy)

    exact = [t.detach().double().requires_grad_() for t in (x, layer.weights.lora_A, layer.weights.lora_B)]
    base = layer.base_layer
    offset = base.bias.double() if base.bias is not None else None
    weight = reference.dense_weight(base).double()
    torch.manual_seed(11)
    # A mask is drawn alike for every dtype of x, but here for its shape in one draw.
    expected = reference.lora_linear(exact[0].view(18, COLUMNS), weight, offset, *exact[1:], 2.0, dropout)
    expected = expected.view(2, 9, ROWS)
    expected.backward(dy.double())

    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    assert y.dtype == dtype and y.shape == (2, 9, ROWS)
    assert relative_error(y, expected) < tolerance
    for name, ours, theirs in zip("xAB", (x, layer.weights.lora_A, layer.weights.lora_B), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        assert relative_error(ours.grad, theirs.grad) < tolerance, name
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [None, torch.float32])
def test_gradients_are_the_parameters_or_fp32_ones(compute: torch.dtype, taken: torch.dtype | None) -> None:
    layer = make_lora("4bit", dtype=torch.bfloat16)
    factors = layer.weights.lora_A, layer.weights.lora_B
    layer(gaussian(5, COLUMNS, dtype=compute)).sum().backward()
    take_gradients(factors, taken)
    layer(gaussian(5, COLUMNS, dtype=compute)).sum().backward()
    for parameter in factors:
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is not None and parameter.grad.dtype == (taken or torch.bfloat16)


def test_dropout_drops_only_in_training() -> None:
    layer = make_lora("4bit", dropout=0.5)
    x = gaussian(5, COLUMNS)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_dx_is_not_computed_for_an_input_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first adapted layer ends the backward pass: its base weight is read once, not twice."""
    from qlora.lora import layer as lora

    calls: list[Any] = []
    real = lora.multiply
    monkeypatch.setattr(lora, "multiply", lambda *a, **k: calls.append(a) or real(*a, **k))
    layer = make_lora("4bit")
    for requires_grad, expected in ((False, 1), (True, 2)):
        calls.clear()
        x = gaussian(5, COLUMNS).requires_grad_(requires_grad)
        layer(x).sum().backward()
        assert len(calls) == expected
        assert (x.grad is not None) == requires_grad
        assert layer.weights.lora_A.grad is not None and layer.weights.lora_B.grad is not None


def test_only_the_input_h_and_a_byte_mask_are_kept() -> None:
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    layer = make_lora("4bit", dropout=0.3)
    x = gaussian(64, COLUMNS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept = {pointer: tensor for pointer, tensor in saved.items() if pointer not in parameters}
    assert x.data_ptr() in kept, "x itself, so that q, k and v share one copy"
    expected = x.nbytes + 64 * RANK * x.element_size() + x.numel()
    assert sum(tensor.nbytes for tensor in kept.values()) == expected


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """64 micro-batches in bf16 compute: gradients add up in fp32, so their error is that of one micro-batch's
    own rounding, averaged; adding in bf16 loses several times more."""
    layer = make_lora("4bit", dtype=torch.bfloat16)
    take_gradients(layer.weights.parameters(), torch.float32)
    x, dy = gaussian(64, 16, COLUMNS, seed=3), gaussian(64, 16, ROWS, seed=4)
    dy += 0.5  # a common part, so that the sum grows as a loss's gradient does
    in_bf16: list[Tensor] = [torch.zeros_like(p) for p in (layer.weights.lora_A, layer.weights.lora_B)]
    for part, gradient in zip(x.to(torch.bfloat16), dy.to(torch.bfloat16), strict=True):
        before = [None if p.grad is None else p.grad.clone() for p in (layer.weights.lora_A, layer.weights.lora_B)]
        layer(part).backward(gradient)
        for total, parameter, old in zip(
            in_bf16, (layer.weights.lora_A, layer.weights.lora_B), before, strict=True
        ):
            total += parameter.grad - (0 if old is None else old)
    leaves = [p.detach().double().requires_grad_() for p in (layer.weights.lora_A, layer.weights.lora_B)]
    weight = reference.dense_weight(layer.base_layer).double()
    whole = reference.lora_linear(x.to(torch.bfloat16).double(), weight, None, *leaves, 2.0)
    whole.backward(dy.to(torch.bfloat16).double())
    for parameter, leaf, rough in zip((layer.weights.lora_A, layer.weights.lora_B), leaves, in_bf16, strict=True):
        assert leaf.grad is not None
        ours = relative_error(parameter.grad, leaf.grad)
        assert ours < 2**-8
        assert ours < relative_error(rough, leaf.grad) / 3


# ---- starting point ---------------------------------------------------------------------------------------


def test_start_of_a() -> None:
    """Kaiming: uniform within 1 / sqrt(in), as nn.Linear. Gaussian: deviation 1 / rank. B is zero."""
    base = nn.Linear(400, 300).requires_grad_(False)
    kaiming = LoRALinear(base, 64, dtype=torch.float32)
    bound = 400**-0.5
    assert 0.999 * bound < kaiming.weights.lora_A.abs().max() <= bound
    assert kaiming.weights.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    normal = LoRALinear(base, 64, dtype=torch.float32, init="gaussian")
    assert normal.weights.lora_A.std().item() == pytest.approx(1 / 64, rel=0.02)  # 25,600 draws: 0.4 % deviation
    assert normal.weights.lora_A.abs().max() > 3 / 64 and abs(normal.weights.lora_A.mean().item()) < 0.02 / 64**0.5
    for layer in (kaiming, normal):
        assert not layer.weights.lora_B.any()
        assert layer.weights.lora_A.shape == (64, 400) and layer.weights.lora_B.shape == (300, 64)


def test_fresh_adapter_is_the_base_bit_for_bit(tiny_4bit: Any) -> None:
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        before = tiny_4bit(ids).logits
        inject_lora(tiny_4bit, LoRAConfig(target_modules="all-linear"))
        after = tiny_4bit(ids).logits
        assert torch.equal(before, after)
        random_adapters(tiny_4bit)
        assert not torch.equal(before, tiny_4bit(ids).logits)


def test_same_seed_same_adapter() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(states))  # the global generator has no say
        model = tiny_dense()
        state_of_torch = torch.get_rng_state()
        inject_lora(model, LoRAConfig(), seed=seed)
        assert torch.equal(torch.get_rng_state(), state_of_torch)
        states.append(lora_state_dict(model))
    first, second, other = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    starts = [key for key in first if "lora_A" in key]
    assert len(starts) == 4 and not any(torch.equal(first[key], other[key]) for key in starts)
    assert not torch.equal(first[starts[0]], first[starts[2]]), "layers differ from one another"


# ---- choosing layers --------------------------------------------------------------------------------------


def test_targets_by_suffix_full_name_and_all_linear(tiny_4bit: Any) -> None:
    layers = linear_layers(tiny_4bit)
    assert len(layers) == 15
    assert list(match_targets(tiny_4bit, ["all-linear"])) == [name for name in layers if name != "lm_head"]
    assert len(match_targets(tiny_4bit, ["q_proj", "v_proj"])) == 4
    assert list(match_targets(tiny_4bit, ["model.layers.1.self_attn.k_proj"])) == [
        "model.layers.1.self_attn.k_proj"
    ]
    assert list(match_targets(tiny_4bit, ["1.mlp.up_proj"])) == ["model.layers.1.mlp.up_proj"]


def test_grouped_query_and_mlp_targets_learn(tiny_4bit: Any) -> None:
    """Layers that are not square: k and v (32, 64), gate and up (160, 64), down (64, 160)."""
    names = inject_lora(tiny_4bit, LoRAConfig(target_modules="k_proj,v_proj,gate_proj,up_proj,down_proj"))
    freeze_base(tiny_4bit)
    random_adapters(tiny_4bit)
    tiny_4bit(torch.arange(12).view(1, 12)).logits.square().sum().backward()
    shapes = {
        name.rpartition(".")[2]: (m.out_features, m.in_features) for name, m in lora_layers(tiny_4bit).items()
    }
    assert len(names) == 10 and shapes["k_proj"] == (32, 64) and shapes["down_proj"] == (64, 160)
    for parameter in lora_parameters(tiny_4bit):
        assert parameter.grad is not None and parameter.grad.norm() > 0
    assert all(parameter.grad is None for parameter in base_parameters(tiny_4bit))


@pytest.mark.parametrize("targets", ["wq", "q_proj,wq", "proj", ""])
def test_target_that_matches_nothing_names_what_there_is(targets: str) -> None:
    model = tiny_dense()
    names = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(InputError, match=names) as caught:
        inject_lora(model, LoRAConfig(target_modules=targets))
    assert "'q_proj'" not in str(caught.value)
    assert not lora_layers(model), "nothing is replaced"


def test_second_injection_is_refused() -> None:
    model = tiny_dense()
    inject_lora(model, LoRAConfig())
    with pytest.raises(InputError, match="already"):
        inject_lora(model, LoRAConfig(target_modules="o_proj"))
    assert len(lora_layers(model)) == 4


# ---- what trains ------------------------------------------------------------------------------------------


def test_freeze_and_unfreeze(tiny_4bit: Any) -> None:
    inject_lora(tiny_4bit, LoRAConfig())
    freeze_base(tiny_4bit)
    trainable = [p for p in tiny_4bit.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in lora_parameters(tiny_4bit)] and len(trainable) == 8
    assert len(base_parameters(tiny_4bit)) + len(trainable) == len(list(tiny_4bit.parameters()))
    unfreeze(tiny_4bit)
    packed = [p for p in tiny_4bit.parameters() if not p.requires_grad]
    assert len(packed) == 14 and all(p.dtype == torch.uint8 for p in packed)
    freeze_base(tiny_4bit)
    assert [id(p) for p in tiny_4bit.parameters() if p.requires_grad] == [id(p) for p in trainable]


def test_unfrozen_dense_base_gets_the_right_gradients() -> None:
    """After `unfreeze` the base trains too, through the composed path: the same outputs, and a dW."""
    layer = make_lora("linear", dtype=torch.float32)
    x = gaussian(9, COLUMNS, seed=3)
    frozen = layer(x)
    unfreeze(layer)
    y = layer(x)
    y.sum().backward()
    base = layer.base_layer
    leaves = [
        t.detach().double().requires_grad_()
        for t in (base.weight, base.bias, layer.weights.lora_A, layer.weights.lora_B)
    ]
    reference.lora_linear(x.double(), *leaves, 2.0).sum().backward()
    assert relative_error(y, frozen) < FP32_TOLERANCE
    for ours, leaf in zip(
        (base.weight, base.bias, layer.weights.lora_A, layer.weights.lora_B), leaves, strict=True
    ):
        assert leaf.grad is not None and relative_error(ours.grad, leaf.grad) < FP32_TOLERANCE


def test_unfrozen_16bit_model_trains_every_weight(tiny_path: str) -> None:
    """`unfreeze` on a bf16 base (--no-4bit): what wants a gradient gets one, adapted or not."""
    model = load_base_model(tiny_path, use_4bit=False, compute_dtype="float32")
    inject_lora(model, LoRAConfig())
    random_adapters(model)
    unfreeze(model)
    model(torch.arange(12).view(1, 12)).logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_tied_weights_are_counted_once() -> None:
    tied, untied = tiny_dense(tie_word_embeddings=True), tiny_dense()
    assert count_parameters(untied) - count_parameters(tied) == 300 * 64
    assert len(base_parameters(untied)) - len(base_parameters(tied)) == 1


# ---- merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["4bit", "16bit", "linear", "conv1d"])
def test_merge_computes_the_same_and_unmerges_bit_for_bit(kind: str) -> None:
    layer = make_lora(kind, dtype=torch.float32).eval()
    x = gaussian(9, COLUMNS, seed=3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        expected = layer(x)
        layer.merge()
        merged = layer(x)
        layer.merge()  # a second time changes nothing
        assert torch.equal(merged, layer(x)) and layer.merged_weight is not None
        # A bf16 base keeps a bf16 merged weight, rounded once.
        assert relative_error(merged, expected) < (2**-8 if kind == "16bit" else FP32_TOLERANCE)
        assert not torch.equal(merged, layer.base_layer(x)), "the update is in it"
        layer.unmerge()
        assert torch.equal(layer(x), expected)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_merged_model_does_not_train(tiny_4bit: Any) -> None:
    inject_lora(tiny_4bit, LoRAConfig())
    random_adapters(tiny_4bit)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = tiny_4bit(ids).logits
        merge_lora(tiny_4bit)
        assert all(layer.merged_weight is not None for layer in lora_layers(tiny_4bit).values())
        assert relative_error(tiny_4bit(ids).logits, expected) < 1e-5  # ten layers, each a few units off
    tiny_4bit.train()
    with pytest.raises(RuntimeError, match="unmerge"):
        tiny_4bit(ids)
    unmerge_lora(tiny_4bit)
    tiny_4bit(ids).logits.sum().backward()
    with torch.no_grad():
        assert torch.equal(tiny_4bit.eval()(ids).logits, expected)


# ---- state ------------------------------------------------------------------------------------------------


def test_state_dict_round_trip_and_names() -> None:
    first, second = tiny_dense(), tiny_dense()
    for model in (first, second):
        inject_lora(model, LoRAConfig())
    random_adapters(first)
    state = lora_state_dict(first)
    assert len(state) == 8 and "model.layers.1.self_attn.v_proj.lora_B.weight" in state
    assert state["model.layers.0.self_attn.v_proj.lora_A.weight"].shape == (8, 64)
    assert state["model.layers.0.self_attn.v_proj.lora_B.weight"].shape == (32, 8)
    load_lora_state_dict(second, state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in lora_state_dict(second).items())
    assert not any(a is b for a, b in zip(lora_parameters(first), lora_parameters(second), strict=True))


def test_every_mismatch_is_reported_and_nothing_changes() -> None:
    model = tiny_dense()
    inject_lora(model, LoRAConfig())
    random_adapters(model)
    before = {key: tensor.clone() for key, tensor in lora_state_dict(model).items()}
    wrong = {key: torch.ones_like(tensor) for key, tensor in before.items()}
    keys = list(wrong)
    del wrong[keys[0]]
    wrong["model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(8, 64)
    wrong[keys[1]] = torch.ones(64, 4)
    wrong[keys[2]] = torch.full((8, 64), torch.nan)
    with pytest.raises(InputError) as caught:
        load_lora_state_dict(model, wrong, origin="some/adapter")
    message = str(caught.value)
    for part in (
        "some/adapter",
        f"missing {keys[0]}",
        "unexpected model.layers.9.self_attn.q_proj.lora_A.weight",
        f"{keys[1]} is (64, 4) but the model wants (64, 8)",
        f"{keys[2]} holds NaN",
    ):
        assert part in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in lora_state_dict(model).items())


# ---- counting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "mlp", "layers", "total", "expected"),
    [(4096, 11008, 32, 6_738_415_616, 4_194_304), (5120, 13824, 40, 13_015_864_320, 6_553_600)],
    ids=["7b", "13b"],
)
def test_golden_counts_llama(hidden: int, mlp: int, layers: int, total: int, expected: int) -> None:
    """r = 8 on q and v: 2 x layers x 8 x (in + out). Modules without memory (meta device)."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    assert count_parameters(model) == total
    inject_lora(model, LoRAConfig(rank=8, target_modules="q_proj,v_proj"))
    freeze_base(model)
    summary = parameter_summary(model)
    assert count_trainable_parameters(model) == summary.trainable == expected
    assert summary.total == total + expected
    assert summary.adapted_layers == 2 * layers
    assert f"{expected:,} trainable of {total + expected:,}" in str(summary)


@pytest.mark.parametrize(
    ("targets", "expected", "layers"), [("c_attn", 294_912, 12), ("c_attn,attn.c_proj", 442_368, 24)]
)
def test_golden_counts_gpt2(targets: str, expected: int, layers: int) -> None:
    """GPT-2 small's Conv1D layers; "attn.c_proj" is not the MLP's c_proj."""
    from accelerate import init_empty_weights
    from transformers import GPT2Config, GPT2LMHeadModel

    with init_empty_weights():
        model = GPT2LMHeadModel(GPT2Config())
    names = inject_lora(model, LoRAConfig(rank=8, target_modules=targets))
    freeze_base(model)
    assert count_trainable_parameters(model) == expected
    assert len(names) == layers and not any("mlp" in name for name in names)


def test_4bit_counts_equal_dense_ones(tiny_4bit: Any) -> None:
    dense = tiny_dense()
    assert count_parameters(tiny_4bit) == count_parameters(dense)
    assert sum(p.numel() for p in tiny_4bit.parameters()) < count_parameters(dense)
    for model in (dense, tiny_4bit):
        inject_lora(model, LoRAConfig(target_modules="all-linear"))
        freeze_base(model)
    assert str(parameter_summary(tiny_4bit)) == str(parameter_summary(dense))


# ---- against PEFT -----------------------------------------------------------------------------------------


def bitsandbytes_twin(model: Any) -> Any:
    """The same 4-bit weights in bitsandbytes' own layers, as transformers would load them."""
    twin = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            plain = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, False, torch.float32, quant_type="nf4", device="meta"
            )
            plain.weight = copy.deepcopy(layer.weight)
            plain.weight.module = plain
            plain.quant_state = plain.weight.quant_state
            plain.bias = copy.deepcopy(layer.bias)
            plain.support_avx512bf16_for_cpu = False  # else it repacks to a layout of bf16 roundings in eval mode
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, plain)
    for end in (twin.get_input_embeddings(), twin.get_output_embeddings()):
        end.weight.data = end.weight.data.float()  # PEFT copies them in their dtype
    twin.is_loaded_in_4bit = True
    return twin


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
@pytest.mark.parametrize("use_4bit", [False, True])
def test_whole_model_equals_peft(use_4bit: bool, targets: str, tmp_path: Path) -> None:
    """The same base and adapter weights here and in PEFT: equal logits and adapter gradients.

    fp32 throughout; two blocks of a few hundred roundings each make 1e-5. The MLP is 128 wide, because
    bitsandbytes' own CPU kernel is wrong for the usual 160.
    """
    peft = pytest.importorskip("peft")
    if use_4bit:
        path = save_tiny_llama(tmp_path / "llama", intermediate_size=128)
        ours = load_base_model(str(path), compute_dtype="float32", cache=False)
        theirs = bitsandbytes_twin(ours)
    else:
        ours, theirs = tiny_dense(intermediate_size=128), tiny_dense(intermediate_size=128)
    inject_lora(ours, LoRAConfig(rank=4, alpha=12, target_modules=targets, adapter_dtype="float32"))
    freeze_base(ours)
    random_adapters(ours)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(theirs, config)
    wrapped = dict(theirs.named_modules())
    peft_parameters = {}
    for key, tensor in lora_state_dict(ours).items():
        layer, part, _ = key.rsplit(".", 2)
        parameter = wrapped[f"base_model.model.{layer}"].get_submodule(f"{part}.default").weight
        parameter.data.copy_(tensor)
        peft_parameters[key] = parameter
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trainable) == len(peft_parameters) == (28 if targets == "all-linear" else 8)

    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (ours, theirs):
        model.train()
        output = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        logits.append(output.detach())
    assert relative_error(logits[0], logits[1]) < 1e-5
    for key, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            expected = peft_parameters[f"{key}.{part}.weight"].grad
            assert relative_error(getattr(layer.weights, part).grad, expected) < 1e-5, key


# ---- DoRA -------------------------------------------------------------------------------------------------


def dora_linear(
    x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, magnitude: Tensor, s: float, dropout: float = 0.0
) -> Tensor:
    """arXiv 2402.09353, equation 5 with the norm detached (4.3): magnitude / |W + s B A| (W x + s B A x) + b."""
    norm = (weight + s * B @ A).norm(dim=1).detach()
    return reference.lora_linear(x, weight, None, A, B, s, dropout) * (magnitude / norm) + (
        0 if bias is None else bias
    )


def make_dora(kind: str, bias: bool = True, dropout: float = 0.0, dtype: Any = torch.bfloat16) -> LoRALinear:
    """A LoRALinear in training mode with B away from zero, and magnitudes away from the norms."""
    layer = make_lora(kind, bias, dropout, dtype)
    norms = reference.dense_weight(layer.base_layer).norm(dim=1)
    layer.weights.variant = DoRA()
    layer.weights.magnitude = nn.Parameter(norms * (1 + 0.5 * gaussian(ROWS, seed=8)))
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4bit", "16bit", "linear", "conv1d"])
def test_fused_dora_equals_composed(kind: str, dtype: torch.dtype, bias: bool, dropout: float) -> None:
    """Output and every gradient, the magnitude's and the bias's too, against plain autograd in fp64."""
    layer = make_dora(kind, bias, dropout, dtype)
    base, magnitude = layer.base_layer, layer.weights.magnitude
    if bias:
        base.bias.requires_grad_()
    x = gaussian(2, 9, COLUMNS, seed=3, dtype=dtype).requires_grad_()
    dy = gaussian(2, 9, ROWS, seed=4, dtype=dtype)
    torch.manual_seed(11)
    y = layer(x)
    y.backward(dy)

    ours = {"x": x, "A": layer.weights.lora_A, "B": layer.weights.lora_B, "magnitude": magnitude}
    leaves = {name: t.detach().double().requires_grad_() for name, t in ours.items()}
    offset = base.bias.detach().double().requires_grad_() if bias else None
    weight = reference.dense_weight(base).double()
    torch.manual_seed(11)
    rows = leaves["x"].view(18, COLUMNS)
    expected = dora_linear(rows, weight, offset, leaves["A"], leaves["B"], leaves["magnitude"], 2.0, dropout)
    expected = expected.view(2, 9, ROWS)
    expected.backward(dy.double())

    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    assert y.dtype == dtype and relative_error(y, expected) < tolerance
    for name, parameter in ours.items():
        assert parameter.grad is not None and leaves[name].grad is not None, name
        assert relative_error(parameter.grad, leaves[name].grad) < tolerance, name
    assert base.weight.grad is None
    if offset is not None:
        assert relative_error(base.bias.grad, offset.grad) < tolerance


@pytest.mark.parametrize("kind", ["4bit", "16bit", "linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_without_the_matrix(kind: str, dtype: torch.dtype) -> None:
    """The expanded square against the norm of the written-out W + s B A in fp64; B grows until it dominates."""
    layer = make_dora(kind)
    weight = reference.dense_weight(layer.base_layer).double()
    B = layer.weights.lora_B.detach().clone()
    for size in (0.0, 0.01, 1.0, 30.0):
        layer.weights.lora_B.data = B * size
        expected = (weight + 2.0 * layer.weights.lora_B.double() @ layer.weights.lora_A.double()).norm(dim=1)
        # In bf16 W and A are rounded in the middle term alone, which is the largest where B is about W's size.
        assert relative_error(weight_norm(layer, dtype), expected) < (2e-6 if dtype == torch.float32 else 2e-3)


def test_a_fresh_dora_is_the_base(tiny_4bit: Any) -> None:
    """c is 1 to the last bit, so the output is the base's: here, in generation's path, exactly."""
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        before = tiny_4bit(ids).logits
        inject_lora(tiny_4bit, LoRAConfig(target_modules="all-linear", use_dora=True))
        assert torch.equal(tiny_4bit(ids).logits, before)
        for layer in lora_layers(tiny_4bit).values():
            scale = layer.output_scale()
            assert scale is not None and torch.equal(scale, torch.ones_like(scale))
            assert torch.equal(layer.weights.magnitude, weight_norm(layer))
    assert relative_error(tiny_4bit(ids).logits, before) < FP32_TOLERANCE  # training's path adds a bias apart


def test_a_row_of_zeros_under_dora() -> None:
    """A pruned output has norm 0: it stays 0, values and gradients, instead of 0 / 0."""
    base = make_base("linear", bias=False)
    base.weight.data[3] = 0
    model = nn.Sequential(base)
    inject_lora(model, LoRAConfig(target_modules="0", use_dora=True, adapter_dtype="float32"))
    y = model.train()(gaussian(5, COLUMNS))
    y.sum().backward()
    assert not y[:, 3].any() and torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in lora_parameters(model))
    merge_lora(model)
    assert torch.isfinite(model.eval()(gaussian(5, COLUMNS))).all()


def test_small_changes_of_the_magnitude_reach_a_bf16_output() -> None:
    """Magnitudes 0.3 % up: c itself rounded to bf16 would be 1, whose neighbour is 1.0078."""
    layer = make_dora("4bit", bias=False)
    layer.weights.magnitude = nn.Parameter(1.003 * weight_norm(layer))
    layer.weights.variant = DoRA()
    x = gaussian(200, COLUMNS, dtype=torch.bfloat16)
    before = F.linear(x.float(), reference.dense_weight(layer.base_layer) + layer.weights.delta_weight())
    for y in (layer(x), layer.eval()(x)):
        growth = (y.float() * before).sum() / before.square().sum() - 1
        assert 0.002 < growth < 0.005  # outputs are rounded by up to 0.4 %, up or down by where they lie


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_lora, make_dora])
@pytest.mark.parametrize("kind", ["4bit", "16bit", "linear", "conv1d"])
def test_inference_equals_training(kind: str, make: Any, dtype: torch.dtype, bias: bool) -> None:
    """The path without gradients, with DoRA's scale fixed or not, against the one with them."""
    if dtype == torch.bfloat16 and kind in ("linear", "conv1d"):
        pytest.skip("torch's own layers hold fp32 weights and compute in these alone")
    layer = make(kind, bias)
    x = gaussian(3, 9, COLUMNS, dtype=dtype)
    training = layer(x)
    assert training.requires_grad
    with torch.no_grad():
        inference = layer(x)
        scale = layer.output_scale(dtype)
        layer.fixed_scale = scale
        assert torch.equal(layer(x), inference)
    # In bf16 the base's part, its sum with the update, under DoRA that with the bias, and the result are rounded.
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    assert inference.dtype == dtype and relative_error(inference, training) < tolerance


def test_dora_keeps_one_output_more() -> None:
    """What the backward pass of the magnitude needs beside x and h: z, (N, O)."""
    sizes = []
    for layer in (make_lora("4bit"), make_dora("4bit")):
        saved: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({t.data_ptr(): t}) or t, lambda t: t
        ):
            layer(gaussian(64, COLUMNS).requires_grad_())
        sizes.append(sum(t.nbytes for t in saved.values() if t.dim() == 2 and t.shape[0] == 64))
    assert sizes[1] - sizes[0] == 64 * ROWS * 4


# ---- scales, patterns, layer ranges -----------------------------------------------------------------------


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    """arXiv 2312.03732: alpha / sqrt(r), with each layer's own rank and alpha."""
    model = tiny_dense()
    config = LoRAConfig(
        rank=16, alpha=8, use_rslora=True, rank_pattern={"1.self_attn.v_proj": 4}, alpha_pattern={"q_proj": 2}
    )
    inject_lora(model, config)
    scales = {
        name.removeprefix("model.layers."): layer.weights.scaling for name, layer in lora_layers(model).items()
    }
    assert scales == {
        "0.self_attn.q_proj": 2 / 16**0.5,
        "0.self_attn.v_proj": 8 / 16**0.5,
        "1.self_attn.q_proj": 2 / 16**0.5,
        "1.self_attn.v_proj": 8 / 4**0.5,
    }
    random_adapters(model)
    layer = lora_layers(model)["model.layers.1.self_attn.v_proj"]
    x = gaussian(5, 64)
    update = x.double() @ layer.weights.lora_A.double().T @ layer.weights.lora_B.double().T * 4
    expected = x.double() @ layer.base_layer.weight.double().T + update
    assert relative_error(layer(x), expected) < FP32_TOLERANCE


def test_patterns_give_ranks_and_alphas() -> None:
    """A name's end, a full name, a pattern; the first that fits wins, as in PEFT."""
    model = tiny_dense()
    config = LoRAConfig(
        rank=8,
        alpha=16,
        target_modules="all-linear",
        rank_pattern=r"layers.0.self_attn.q_proj=2, mlp\..*=3, q_proj=5",
        alpha_pattern="model.layers.1.mlp.up_proj=1.5",
    )
    inject_lora(model, config)
    ranks = {name.removeprefix("model.layers."): layer.weights.rank for name, layer in lora_layers(model).items()}
    assert ranks["0.self_attn.q_proj"] == 2 and ranks["1.self_attn.q_proj"] == 5
    assert {rank for name, rank in ranks.items() if "mlp" in name} == {3}
    assert ranks["0.self_attn.k_proj"] == 8
    with pytest.raises(InputError, match=r"\['proj'\] names none"):  # the end of a name, but not after a dot
        inject_lora(tiny_dense(), LoRAConfig(rank_pattern="proj=7"))
    alphas = {name: layer.weights.alpha for name, layer in lora_layers(model).items()}
    assert alphas.pop("model.layers.1.mlp.up_proj") == 1.5 and set(alphas.values()) == {16}
    for name, layer in lora_layers(model).items():
        assert layer.weights.lora_A.shape[0] == layer.weights.lora_B.shape[1] == config.rank_of(name)
        assert layer.weights.scaling == config.alpha_of(name) / config.rank_of(name)


def test_layers_choose_decoder_layers() -> None:
    model = tiny_dense(num_hidden_layers=5)
    names = inject_lora(model, LoRAConfig(target_modules="q_proj,up_proj", layers="0, 3-4"))
    assert names == [f"model.layers.{i}.{part}" for i in (0, 3, 4) for part in ("self_attn.q_proj", "mlp.up_proj")]


def test_a_decoder_layer_that_is_not_there() -> None:
    model = tiny_dense()
    with pytest.raises(
        InputError, match="decoder layer 2, where this model has none to adapt; its layers are 0 to 1"
    ):
        inject_lora(model, LoRAConfig(layers="1-2"))
    assert not lora_layers(model)


# ---- biases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_4bit", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_gradients_of_biases(bias: Any, use_4bit: bool, tmp_path: Path) -> None:
    """Those of adapted layers (LoRAFunction), of others (FrozenLinear), against a plain merged model in fp32."""
    from transformers import LlamaForCausalLM

    path = save_tiny_llama(tmp_path / "llama", attention_bias=True, mlp_bias=True)
    model = load_base_model(str(path), use_4bit, compute_dtype="float32", cache=False)
    config = LoRAConfig(target_modules="q_proj,up_proj", adapter_dtype="float32", bias=bias)
    inject_lora(model, config)
    freeze_base(model)
    random_adapters(model)
    plain = LlamaForCausalLM(model.config)
    merged = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer.", ".")
        if ".lora." not in name:
            packed = hasattr(parameter, "quant_state")
            merged[name] = reference.dequantize(parameter) if packed else parameter.detach().float()
    for name, layer in lora_layers(model).items():
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.weights.delta_weight()
    plain.load_state_dict(merged)

    ids = torch.arange(24).view(2, 12)
    for network in (model.train(), plain.train()):
        network(ids).logits.square().mean().backward()
    everywhere = [name for name, _ in plain.named_parameters() if name.endswith(".bias")]
    wanted = {
        "none": [],
        "all": everywhere,
        "lora_only": [n for n in everywhere if n.split(".")[-2] in ("q_proj", "up_proj")],
    }[bias]
    assert len(everywhere) == 2 * 7 and len(wanted) == {"none": 0, "all": 14, "lora_only": 4}[bias]
    state = lora_state_dict(model)
    assert sorted(name for name in state if name.endswith(".bias")) == sorted(wanted)
    gradients = {
        name.replace(".base_layer.", "."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    assert sorted(name for name in gradients if ".lora." not in name) == sorted(wanted)
    for name in wanted:
        assert relative_error(gradients[name], plain.get_parameter(name).grad) < 1e-5, name


def test_trained_biases_are_copies(tmp_path: Path) -> None:
    """Training moves the adapter's bias; without the adapter the base answers as before, bit for bit."""
    path = save_tiny_llama(tmp_path / "llama", attention_bias=True)
    model = load_base_model(str(path), compute_dtype="float32", cache=False)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        inject_lora(model, LoRAConfig(bias="lora_only"))
        adapter = active_adapter(model)
        random_adapters(model)
        adapted = model(ids).logits
        assert not torch.equal(adapted, before)
        activate(model, None)
        assert torch.equal(model(ids).logits, before)
        activate(model, adapter)
        assert torch.equal(model(ids).logits, adapted)
