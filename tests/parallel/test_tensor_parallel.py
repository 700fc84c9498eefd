"""Layers that several processes compute together against whole ones, and runs of them against one process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.lora.layer import LoRALinear
from qlora.lora.optimizer import take_gradients
from qlora.model.load import load_base_model
from qlora.parallel.tensor_parallel import GroupExchange, WeightCut, split_model, split_of
from qlora.quant.decode import decode_copy, decode_in_place
from qlora.quant.layers import Linear4bit, dequantize_into_scratch, logical_numel, logical_shape
from qlora.quant.parts import Part, cut_weight
from qlora.quant.weight import QuantConfig, block_scales, dequantize_weight, quantize_weight
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tools.proof import DIVISIBLE, Case, Proof

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
            assert torch.equal(dequantize_into_scratch(layer, dtype), expected)
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
    lora.weights.lora_B.data.copy_(
        torch.randn(lora.weights.lora_B.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    )
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
        assert (
            layer.weights.lora_A.grad is not None and layer.weights.lora_B.grad is not None and x.grad is not None
        )
        return y.detach(), answered, x.grad, layer.weights.lora_A.grad, layer.weights.lora_B.grad

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
    take_gradients(lora.weights.parameters(), torch.float32)
    lora(torch.randn(3, 128)).sum().backward()
    gradient = lora.weights.lora_B.grad
    assert gradient is not None and gradient.dtype == torch.float32 and lora.weights.lora_B.dtype == torch.bfloat16
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


@pytest.mark.parametrize(
    "name", ["TP", "TP, Qwen3, sequence parallel", "TP, biases", "TP, biases, sequence parallel"]
)
def test_two_processes_learn_as_one(proof: Proof, name: str) -> None:
    """Both kinds of exchange, packed and not, recomputed and not, with dropout; more: `python -m tools.proof`."""
    proof.check(name)


def test_a_damaged_part_is_found(proof: Proof) -> None:
    """Two blocks of codes of one process are exchanged: no process trains."""
    assert [set(result) for result in proof.found("damaged")] == [{"refused"}] * 2


@pytest.mark.full
def test_bf16_is_as_near_on_three_processes(tmp_path: Path, smollm2: str) -> None:
    """Sums are rounded otherwise than one process's: both are as far from fp32."""
    settings: dict[str, Any] = {"steps": 1, "rows": 4, "batch_size": 4, "longest": 40}
    cases = [
        Case(dtype, smollm2, 3, {"tensor_parallel": 3}, compute_dtype=dtype, **settings)
        for dtype in ("float32", "bfloat16")
    ]
    proof = Proof(tmp_path, cases)
    proof.run_apart()
    right = proof.expected("float32")["gradients"]
    split, alone = (
        relative_error(run["gradients"], right) for run in (proof.found("bfloat16")[0], proof.expected("bfloat16"))
    )
    print(f"bf16's first gradient: {split:.3f} from that in fp32 by three processes, {alone:.3f} by one")
    assert split < 1.5 * alone
