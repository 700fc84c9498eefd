"""Layers that several processes compute together against whole ones, and runs of them against one process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from qlora.adapter import load_adapter
from qlora.distributed import Ranks
from qlora.errors import InputError
from qlora.lora import LoRALinear
from qlora.model import load_base_model
from qlora.quantize import (
    Linear4bit,
    Part,
    QuantConfig,
    block_scales,
    borrow_weight,
    cut_weight,
    decode_copy,
    decode_in_place,
    dequantize_weight,
    logical_numel,
    logical_shape,
    quantize_weight,
)
from qlora.tensor_parallel import GroupExchange, WeightCut, split_model, split_of
from qlora.trainer import evaluate
from tests.models import save_tiny_llama, tiny_llama_config
from tests.reference import relative_error
from tests.split_worker import Case, make_examples, run_case

DIVISIBLE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4)
RTOL = 1e-5  # fp32: sums of parts, a step's rounding carried on by the next


# ---- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_parts_stand_for_the_numbers_of_the_whole(quant_type: str, double_quant: bool, dim: int) -> None:
    """96 x 384 is 576 blocks, 6 a row: groups of 256 scales begin inside of rows and end in other parts."""
    weight = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    whole = quantize_weight(weight, QuantConfig(quant_type, double_quant))
    for index in range(3):
        part = Part(dim, index, 3)
        layer = Linear4bit(cut_weight(whole, part), None)
        layer.part = part
        assert logical_shape(layer) == (96, 384) and logical_numel(layer.weight) == 96 * 384
        for dtype in (torch.float32, torch.bfloat16):
            expected = part.of(dequantize_weight(whole, dtype))
            assert torch.equal(dequantize_weight(layer.weight, dtype), expected)
            assert torch.equal(borrow_weight(layer, dtype), expected)
            x = torch.randn(3, expected.shape[1]).to(dtype)
            assert decode_in_place(layer, dtype) is None
            for dense in (True, False):
                torch.testing.assert_close(decode_copy(layer, dtype, dense)(x), x @ expected.T)
        scales = part.of(block_scales(whole.quant_state).view(96, 6))
        assert torch.equal(block_scales(layer.weight.quant_state), scales.reshape(-1))
        kept = (layer.weight.data, layer.weight.quant_state.absmax)
        assert all(
            tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept
        )  # copies: no more is held
        assert kept[1].dtype == (torch.uint8 if double_quant else torch.float32)


def test_a_weight_is_not_cut_through_blocks() -> None:
    whole = quantize_weight(torch.randn(64, 192), QuantConfig())
    with pytest.raises(ValueError, match=r"64 x 192 in 2 parts of columns, .*blocks of 64"):
        cut_weight(whole, Part(1, 0, 2))
    cut = WeightCut.__new__(WeightCut)
    cut.ranks, cut.samples = Ranks(0, 2, 2), {}
    with pytest.raises(
        InputError, match=r"--tensor-parallel 2 does not divide m.layers.1.self_attn.o_proj.weight"
    ):
        cut("m.layers.1.self_attn.o_proj.weight", whole)


def test_dense_weights_and_biases_are_cut_alike() -> None:
    """A weight that a 4-bit checkpoint keeps in 16 bits; the bias behind a sum counts once."""
    weight, bias = torch.randn(64, 128), torch.randn(64)
    for index in range(2):
        cut = WeightCut.__new__(WeightCut)
        cut.ranks, cut.samples = Ranks(index, 2, 2), {}
        q, o = "m.layers.0.self_attn.q_proj", "m.layers.0.self_attn.o_proj"
        assert torch.equal(cut(f"{q}.weight", weight), weight.chunk(2)[index])
        assert torch.equal(cut(f"{q}.bias", bias), bias.chunk(2)[index])
        assert torch.equal(cut(f"{o}.weight", weight), weight.chunk(2, 1)[index])
        assert torch.equal(cut(f"{o}.bias", bias), bias * (index == 0))
        assert cut("m.norm.weight", bias) is bias and len(cut.samples) == 4


# ---- one layer --------------------------------------------------------------------------------------------


def adapted(layer: Linear4bit, dropout: float, dtype: torch.dtype = torch.float32) -> LoRALinear:
    lora = LoRALinear(layer, 8, 16.0, dropout, dtype, generator=torch.Generator().manual_seed(1))
    lora.lora_B.data.copy_(torch.randn(lora.lora_B.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    return lora.train()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_layer_add_up(dim: int, dropout: float) -> None:
    """Outputs one beside the other, or summed; each gradient the sum of the parts'; with the same dropout mask."""
    whole = quantize_weight(torch.randn(192, 384, generator=torch.Generator().manual_seed(0)), QuantConfig())
    x = torch.randn(2, 20, 384, generator=torch.Generator().manual_seed(3))
    dy = torch.randn(2, 20, 192, generator=torch.Generator().manual_seed(4))

    def compute(layer: LoRALinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = layer(x)
        y.backward(dy)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), layer(x))
            answered = layer(x)
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None and x.grad is not None
        return y.detach(), answered, x.grad, layer.lora_A.grad, layer.lora_B.grad

    y, answered, dx, dA, dB = compute(adapted(Linear4bit(whole, None), dropout), x, dy)
    parts = []
    for index in range(3):
        part = Part(dim, index, 3)
        layer = Linear4bit(cut_weight(whole, part), None)
        layer.part = part
        own_x = x if dim == 0 else x.chunk(3, -1)[index]
        own_dy = dy.chunk(3, -1)[index] if dim == 0 else dy
        parts.append(compute(adapted(layer, dropout), own_x, own_dy))
        assert parts[-1][3].shape == dA.shape and parts[-1][4].shape == dB.shape
    ys, answers, dxs, dAs, dBs = zip(*parts, strict=True)
    joined = (lambda t: torch.cat(t, -1), sum) if dim == 0 else (sum, lambda t: torch.cat(t, -1))
    pairs = [(joined[0](ys), y), (joined[0](answers), answered), (joined[1](dxs), dx), (sum(dAs), dA)]
    for found, expected in [*pairs, (sum(dBs), dB)]:
        assert relative_error(found, expected) < 1e-5


def test_gradients_of_bf16_adapters_leave_in_fp32() -> None:
    whole = quantize_weight(torch.randn(128, 128), QuantConfig())
    layer = Linear4bit(cut_weight(whole, Part(0, 1, 2)), None)
    layer.part = Part(0, 1, 2)
    lora = adapted(layer, 0.0, torch.bfloat16)
    lora(torch.randn(3, 128)).sum().backward()
    gradient = lora.lora_B.grad
    assert gradient is not None and gradient.dtype == torch.float32 and lora.lora_B.dtype == torch.bfloat16
    assert not gradient[:64].any() and gradient[64:].all()
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_every_process_has_its_tokens() -> None:
    """7 tokens among 3: 3, 3 and 1 with two rows of zeros behind."""
    x = torch.arange(2 * 7 * 4.0).view(2, 7, 4) + 1
    own = [GroupExchange(Ranks(rank, 3, 3, sequence_parallel=True), True, True).own(x) for rank in range(3)]
    assert [tuple(part.shape) for part in own] == [(2, 3, 4)] * 3
    assert torch.equal(torch.cat(own, 1)[:, :7], x) and not torch.cat(own, 1)[:, 7:].any()


def test_what_a_process_holds_of_a_layer() -> None:
    ranks = Ranks(5, 8, 4)
    assert split_of("model.layers.1.mlp.down_proj", ranks) == Part(1, 1, 4)
    assert split_of("model.layers.1.self_attn.q_proj", ranks) == Part(0, 1, 4)
    assert split_of("model.layers.1.input_layernorm", ranks) is None and split_of("lm_head", ranks) is None


def test_blocks_that_are_computed_otherwise_are_refused(tmp_path: Path) -> None:
    model = str(save_tiny_llama(tmp_path / "gelu", hidden_act="gelu", **DIVISIBLE))
    cut = WeightCut(model, Ranks(0, 2, 2))
    network = load_base_model(model, compute_dtype="float32", cut=cut)
    with pytest.raises(InputError, match="LlamaDecoderLayer of this model have another activation"):
        split_model(network, cut)


def test_a_split_model_only_trains(tmp_path: Path) -> None:
    model = str(save_tiny_llama(tmp_path / "llama", **DIVISIBLE))
    cut = WeightCut(model, Ranks(0, 2, 2))
    network = load_base_model(model, compute_dtype="float32", cut=cut)
    split_model(network, cut)
    with pytest.raises(InputError, match="only trains"):
        network(input_ids=torch.arange(5)[None], use_cache=True)


# ---- runs -------------------------------------------------------------------------------------------------


def run_split(cases: list[Case], folder: Path, processes: int) -> dict[str, dict[str, Tensor]]:
    """What each case gives in so many processes."""
    file = folder / "cases.json"
    file.write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "tests.split_worker", str(file), str(folder), str(processes)]
    root, alone = Path(__file__).parents[1], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=os.environ | alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case.name: load_file(folder / f"{case.name}.safetensors") for case in cases}


def in_one_process(case: Case) -> dict[str, Tensor]:
    return run_case(replace(case, tensor=1, sequence=False, save=None), Accelerator(cpu=True))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], steps: int, rtol: float = RTOL) -> None:
    """The loss of every step, and all adapters' gradient in each as one vector."""
    assert torch.equal(found["base"], expected["base"])
    assert found["losses"].shape == (steps + 1,) == expected["losses"].shape
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=rtol, atol=0)
    for step in range(steps):
        gradient = expected[f"gradient of step {step}"]
        assert gradient.norm() > 0
        assert relative_error(found[f"gradient of step {step}"], gradient) < rtol, f"gradient of step {step}"


def save_with_biases(directory: Path, kind: str, **settings: Any) -> str:
    """A random model of `kind` whose biases and norms are no zeros and ones."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**tiny_llama_config(**DIVISIBLE).to_dict(), **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(directory)
    return str(directory)


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    """Both kinds of exchange, packed and not, recomputed and not, with dropout; the adapter goes back to one."""
    llama = str(save_tiny_llama(tmp_path / "llama", **DIVISIBLE))
    biased = save_with_biases(tmp_path / "biased", "Llama", attention_bias=True, mlp_bias=True)
    normed = save_with_biases(tmp_path / "normed", "Qwen3", head_dim=32)
    everything = Case("everything", biased, targets="all-linear", dropout=0.1, packing=False, recompute="on")
    cases = [
        Case("default", llama, save=str(tmp_path / "adapter")),
        Case("tokens", normed, targets="all-linear", sequence=True),
        everything,
        replace(everything, name="tokens_too", sequence=True),
        Case("damaged", llama, damage=True),
    ]
    found = run_split([replace(case, tensor=2) for case in cases], tmp_path, 2)
    for case in cases[:-1]:
        compare(found[case.name], in_one_process(case), case.steps)
    assert "refused" in found["damaged"]

    model = load_base_model(llama, compute_dtype="float32")
    load_adapter(model, tmp_path / "adapter")
    held_out = evaluate(model, make_examples(300)[:5], Accelerator(cpu=True), 64)
    assert held_out == pytest.approx(found["default"]["losses"][-1].item(), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
@pytest.mark.parametrize(("tensor", "processes"), [(2, 2), (2, 4), (4, 4)])
def test_ten_steps_as_one_process(tmp_path: Path, tensor: int, processes: int, targets: str) -> None:
    """Every way of exchanging, and data parallel groups of two where there are four processes."""
    llama = str(save_tiny_llama(tmp_path / "llama", **DIVISIBLE))
    cases = [
        Case(f"{sequence}-{recompute}-{packing}", llama, tensor, sequence, targets, recompute, packing, steps=10)
        for sequence in (False, True)
        for recompute in ("off", "on")
        for packing in (True, False)
    ]
    extra = {"use_rslora": True, "rank_pattern": {"q_proj": 8}}
    cases.append(Case("rslora", llama, tensor, targets=targets, extra=extra, steps=10))
    found = run_split(cases, tmp_path, processes)
    for case in cases:
        expected = in_one_process(case)
        show(f"TP {tensor} of {processes}, {targets}, {case.name}", found[case.name], expected)
        compare(found[case.name], expected, 10)


@pytest.mark.full
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_ten_steps_of_other_families(tmp_path: Path, kind: str, sequence: bool) -> None:
    settings = {"Mistral": {"sliding_window": 30}, "Qwen3": {"head_dim": 32}}.get(kind, {})
    case = Case(kind, save_with_biases(tmp_path / "model", kind, **settings), 2, sequence, "all-linear", steps=10)
    compare(run_split([case], tmp_path, 2)[kind], in_one_process(case), 10)


@pytest.mark.full
def test_ten_steps_of_the_real_model(tmp_path: Path, smollm2: str) -> None:
    """SmolLM2-135M has 9 heads and 3 key-value heads: three processes."""
    cases = [
        Case("qv", smollm2, 3, steps=10),
        Case("all", smollm2, 3, True, "all-linear", "on", steps=10),
        Case("bf16", smollm2, 3, adapter_dtype="bfloat16", compute_dtype="bfloat16", steps=1),
    ]
    found = run_split(cases, tmp_path, 3)
    expected = {case.name: in_one_process(case) for case in cases}
    for case in cases:
        assert 3 * found[case.name]["block bytes"] == expected[case.name]["block bytes"]
        show(f"SmolLM2 TP 3, {case.name}", found[case.name], expected[case.name])
    compare(found["qv"], expected["qv"], 10)
    compare(found["all"], expected["all"], 10)
    # In bf16 three processes' sums are rounded otherwise than one's: both are as far from fp32.
    first = "gradient of step 0"
    split, alone = (relative_error(run["bf16"][first], expected["qv"][first]) for run in (found, expected))
    print(f"bf16's first gradient: {split:.3f} from that in fp32 by three processes, {alone:.3f} by one")
    assert split < 1.5 * alone


def show(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    losses = ((found["losses"] - expected["losses"]) / expected["losses"]).abs().max().item()
    keys = [key for key in expected if key.startswith("gradient")]
    gradients = max(relative_error(found[key], expected[key]) for key in keys)
    print(f"{what}: losses differ by {losses:.1e} of themselves, gradients by {gradients:.1e}")
