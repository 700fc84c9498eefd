"""quant/weight.py: bits against bitsandbytes' own, values and gradients against a plain reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.quant import weight as quantize
from qlora.quant.decode import decode_copy
from qlora.quant.layers import (
    FrozenMatrix,
    Linear4bit,
    Linear16bit,
    dequantize_into_scratch,
    frozen_conv1d,
    frozen_linear,
    logical_numel,
    logical_shape,
)
from qlora.quant.storage import packed_tensors, unpack_tensors
from qlora.quant.weight import QuantConfig, dequantize_weight, quantize_weight
from qlora.system.errors import InputError
from tests import reference
from tests.reference import relative_error

FORMATS = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]
# 48, 80, 96, 160, 176 and 688 came out wrong by 10 to 40 % from bitsandbytes 0.50's own CPU kernel.
IN_FEATURES = (40, 48, 64, 72, 80, 96, 100, 160, 176, 576, 688)
# One rounding of a code's product with its scale: both sides multiply the same two fp32 numbers.
FP32_TOLERANCE = 1e-6
BF16_ROUNDING = 2**-8


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- quantizing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double"), FORMATS)
@pytest.mark.parametrize("shape", [(32, 128), (48, 40), (3, 25), (1, 1), (1100, 1000)])
def test_bits_equal_bitsandbytes(shape: tuple[int, int], kind: str, double: bool, dtype: torch.dtype) -> None:
    """Quantizing in pieces changes nothing: codes, scales and double-quantized scales, bit for bit."""
    if shape == (1100, 1000):
        assert math.prod(shape) > quantize.PIECE and math.prod(shape) % quantize.PIECE
    weight = gaussian(*shape, dtype=dtype)
    original = weight.clone()
    ours = quantize_weight(weight, QuantConfig(kind, double))
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(weight, original)
    assert torch.equal(ours.data, codes)
    theirs, mine = state.as_dict(packed=True), ours.quant_state.as_dict(packed=True)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key


def test_block_size_is_honoured() -> None:
    for block_size in quantize.BLOCK_SIZES:
        assert quantize.PIECE % block_size == 0
        weight = quantize_weight(gaussian(16, 256), QuantConfig(block_size=block_size, double_quant=False))
        assert weight.quant_state.absmax.numel() == 16 * 256 // block_size
        assert (
            relative_error(dequantize_weight(weight, torch.float32), reference.dequantize(weight)) < FP32_TOLERANCE
        )


def test_golden_error_and_size() -> None:
    """NF4 of a Gaussian is off by 0.092 of its norm and takes 4.127 bits per weight (QLoRA, section 3).

    FP4's levels fit a Gaussian less well. The tolerances are the spread over seeds.
    """
    dense = gaussian(1024, 1024)
    errors = {
        kind: relative_error(dequantize_weight(quantize_weight(dense, QuantConfig(kind)), torch.float32), dense)
        for kind in ("nf4", "fp4")
    }
    assert errors["nf4"] == pytest.approx(0.092, abs=0.001)
    assert errors["fp4"] > 1.2 * errors["nf4"]
    weight = quantize_weight(dense, QuantConfig())
    state = weight.quant_state
    stored = (weight.data, state.absmax, state.state2.absmax)
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored) / dense.numel()
    assert bits == pytest.approx(4.127, abs=0.001)


def test_all_zero_weights_stay_zero() -> None:
    weight = quantize_weight(torch.zeros(64, 64), QuantConfig(double_quant=False))
    assert torch.equal(dequantize_weight(weight, torch.float32), torch.zeros(64, 64))


@pytest.mark.parametrize("settings", [{"quant_type": "int4"}, {"block_size": 48}])
def test_bad_config_is_refused_with_its_value(settings: dict[str, Any]) -> None:
    (value,) = settings.values()
    with pytest.raises(InputError, match=f"{value}.*choose"):
        QuantConfig(**settings)


# ---- dequantizing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "double"), FORMATS)
@pytest.mark.parametrize("columns", IN_FEATURES)
def test_dequantize_equals_reference(columns: int, kind: str, double: bool) -> None:
    for rows in (64, 33):  # whole blocks, and for most widths a ragged last block
        weight = quantize_weight(gaussian(rows, columns, seed=columns), QuantConfig(kind, double))
        expected = reference.dequantize(weight)
        assert relative_error(dequantize_weight(weight, torch.float32), expected) < FP32_TOLERANCE
        assert relative_error(dequantize_weight(weight, torch.bfloat16), expected) < BF16_ROUNDING
        assert dequantize_weight(weight, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 25), (1, 1), (7, 9), (5, 64), (1, 63)])
def test_dequantize_ragged_and_odd(shape: tuple[int, int]) -> None:
    for kind, double in FORMATS:
        weight = quantize_weight(gaussian(*shape), QuantConfig(kind, double))
        assert (
            relative_error(dequantize_weight(weight, torch.float32), reference.dequantize(weight)) < FP32_TOLERANCE
        )


# ---- layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "double"), FORMATS)
def test_borrowed_weight_has_the_same_bits(kind: str, double: bool, dtype: torch.dtype) -> None:
    """Small after large and large after small, in one buffer; 3 x 25 has a ragged block, and fp16 no kernel."""
    buffers = set()
    for rows, columns in [(32, 128), (3, 25), (7, 80), (300, 576), (4, 48), (64, 64)]:
        layer = Linear4bit(quantize_weight(gaussian(rows, columns, seed=rows), QuantConfig(kind, double)), None)
        borrowed = dequantize_into_scratch(layer, dtype)
        assert torch.equal(borrowed, dequantize_weight(layer.weight, dtype))
        buffers.add(borrowed.data_ptr() if rows in (4, 64) else None)
    assert len(buffers - {None}) == (1 if dtype != torch.float16 else 2)


def make_layer(kind: str, rows: int, columns: int, bias: bool = True) -> nn.Module:
    dense = gaussian(rows, columns, seed=1)
    offset = gaussian(rows, seed=2) if bias else None
    if kind == "4bit":
        return Linear4bit(quantize_weight(dense, QuantConfig()), offset)
    return Linear16bit(dense.to(torch.bfloat16), offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4bit", "16bit"])
@pytest.mark.parametrize("columns", [64, 80, 100])
def test_frozen_layer_values_and_gradient(columns: int, kind: str, dtype: torch.dtype) -> None:
    """Against F.linear in fp64 on the dequantized weight; bf16 rounds operands, product and bias: 2 units."""
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else 2 * BF16_ROUNDING
    for bias in (True, False):
        layer = make_layer(kind, 33, columns, bias)
        x = gaussian(2, 5, columns, seed=3, dtype=dtype).requires_grad_()
        dy = gaussian(2, 5, 33, seed=4, dtype=dtype)
        y = layer(x)
        y.backward(dy)
        exact = x.detach().double().requires_grad_()
        offset = None if layer.bias is None else layer.bias.double()
        expected = F.linear(exact, reference.dense_weight(layer).double(), offset)
        expected.backward(dy.double())
        assert y.dtype == dtype and x.grad is not None and exact.grad is not None
        assert relative_error(y, expected) < tolerance
        assert relative_error(x.grad, exact.grad) < tolerance
        assert layer.weight.grad is None and all(not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4bit", "16bit"])
def test_bias_of_a_frozen_layer_may_train(kind: str, dtype: torch.dtype) -> None:
    """bias="all" trains the biases of layers that no adapter wraps, too; a sum over tokens, in fp32."""
    layer = make_layer(kind, 33, 64)
    layer.bias = nn.Parameter(gaussian(33, seed=2))
    dy = gaussian(3, 50, 33, seed=4, dtype=dtype)
    layer(gaussian(3, 50, 64, seed=3, dtype=dtype)).backward(dy)
    assert layer.bias.grad is not None and layer.weight.grad is None
    assert relative_error(layer.bias.grad, dy.double().sum((0, 1))) < FP32_TOLERANCE


@pytest.mark.parametrize("kind", ["linear", "conv1d", "matrix"])
def test_unfrozen_weight_gets_its_gradient(kind: str) -> None:
    """`unfreeze` lets a 16-bit base train in full: no layer may drop the gradient of its weight."""
    dense = gaussian(33, 80, seed=1)
    if kind == "linear":
        layer: nn.Module = Linear16bit(dense.clone(), None)
    elif kind == "conv1d":
        layer = frozen_conv1d()(33, 80)
        layer.weight.data = dense.T.clone()
    else:
        layer = FrozenMatrix(33, 80)
        layer.weight.data = dense.clone()
    layer.weight.requires_grad_()
    x, dy = gaussian(5, 80, seed=3), gaussian(5, 33, seed=4)
    y = layer(x)
    y.backward(dy)
    expected = dy.T @ x
    assert relative_error(y, x @ dense.T) < FP32_TOLERANCE
    assert layer.weight.grad is not None
    assert relative_error(layer.weight.grad, expected.T if kind == "conv1d" else expected) < FP32_TOLERANCE


@pytest.mark.parametrize("packed", [True, False])
def test_frozen_matrix(packed: bool) -> None:
    """An expert's matrix: (out, in), in 4 or 16 bits, its input's gradient and nothing else."""
    layer = FrozenMatrix(33, 80)
    dense = gaussian(33, 80, seed=1)
    layer.weight = quantize_weight(dense, QuantConfig()) if packed else nn.Parameter(dense, requires_grad=False)
    x, dy = gaussian(5, 80, seed=3).requires_grad_(), gaussian(5, 33, seed=4)
    y = layer(x)
    y.backward(dy)
    expected = reference.dequantize(layer.weight) if packed else dense
    assert relative_error(y, x.detach() @ expected.T) < FP32_TOLERANCE
    assert x.grad is not None and relative_error(x.grad, dy @ expected) < FP32_TOLERANCE
    assert not isinstance(layer, nn.Linear), "LoRA would target it"


@pytest.mark.parametrize("kind", ["4bit", "16bit"])
def test_frozen_layer_saves_no_activation(kind: str) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    layer = make_layer(kind, 32, 64)
    x = gaussian(5, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.linear(x, torch.ones(32, 64, requires_grad=True))
        assert len(saved) == 2, "the hook must see what F.linear saves"
        saved.clear()
        y = layer(x)
    assert saved == []
    assert y.grad_fn is not None


def test_linear4bit_is_bitsandbytes_layer() -> None:
    layer = make_layer("4bit", 48, 80)
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert isinstance(layer.weight, bitsandbytes.nn.Params4bit)
    assert (layer.in_features, layer.out_features) == (80, 48) and logical_shape(layer) == (48, 80)


def test_evaluation_leaves_training_alone() -> None:
    """Weight bytes, outputs and gradients are those from before.

    bitsandbytes' own forward repacks the weight when it evaluates on an AVX512-BF16 CPU; every gradient
    below the layer is None from then on.
    """
    layer = make_layer("4bit", 64, 128)
    layer.support_avx512bf16_for_cpu = True  # as on such a CPU: ours must not depend on what the machine has
    x, dy = gaussian(4, 128, seed=3), gaussian(4, 64, seed=4)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        assert leaf.grad is not None and leaf.grad.norm() > 0
        return leaf.grad

    layer.train()
    before, stored = gradient(), {k: v.clone() for k, v in packed_tensors(layer.weight).items()}
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
        layer(x.to(torch.bfloat16))
    layer.train()
    assert torch.equal(evaluated, layer(x).detach())
    for key, tensor in packed_tensors(layer.weight).items():
        assert torch.equal(tensor, stored[key]), key
    assert torch.equal(gradient(), before)


def test_repacking_is_switched_off() -> None:
    assert make_layer("4bit", 64, 128).support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("kind", "rows", "columns"), [("4bit", 64, 128), ("4bit", 33, 80), ("16bit", 33, 80)])
def test_decoding_uses_a_copy(kind: str, rows: int, columns: int, dense: bool, dtype: torch.dtype) -> None:
    """A few rows without gradient go through the copy; all else does not, and the weight stays as it is.

    A dense copy holds the training path's numbers. A 4-bit copy has scales and activations in bf16, where
    bitsandbytes' kernel applies: two roundings of 2^-8.
    """
    layer = make_layer(kind, rows, columns).train()
    stored = layer.weight.detach().clone()
    layer.decode = decode_copy(layer, dtype, dense)
    few, many = gaussian(2, 3, columns, dtype=dtype), gaussian(100, columns, dtype=dtype)

    def run(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaf = few.clone().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        assert leaf.grad is not None
        with torch.no_grad():
            return layer(few), layer(many), y.detach(), leaf.grad

    decoded, *others = run(layer)
    layer.decode = None
    expected, *expected_others = run(layer)
    assert decoded.shape == (2, 3, rows) and decoded.dtype == dtype
    assert relative_error(decoded, expected) < (FP32_TOLERANCE if dense or rows == 33 else 2 * BF16_ROUNDING)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, expected_others, strict=True))
    assert torch.equal(layer.weight, stored)
    layer.decode = lambda x: torch.zeros(())
    decoded, *others = run(layer)
    assert decoded.shape == (), "the copy is what a few rows use"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, expected_others, strict=True))


# ---- storing and counting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "double"), FORMATS)
def test_packed_tensors_round_trip(tmp_path: Path, kind: str, double: bool) -> None:
    weight = quantize_weight(gaussian(33, 80, dtype=torch.bfloat16), QuantConfig(kind, double))
    save_file(packed_tensors(weight), tmp_path / "weight.safetensors")
    back = unpack_tensors(load_file(tmp_path / "weight.safetensors"), torch.device("cpu"))
    assert torch.equal(back.data, weight.data) and back.dtype == weight.dtype
    assert (back.quant_type, back.compress_statistics, back.blocksize) == (kind, double, 64)
    assert back.quant_state.shape == weight.quant_state.shape
    first, second = packed_tensors(weight), packed_tensors(back)
    assert first.keys() == second.keys() and len(first) > 2
    assert all(torch.equal(first[key], second[key]) for key in first)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_weight(back, dtype), dequantize_weight(weight, dtype))


def test_logical_numel_counts_weights_not_bytes() -> None:
    for shape in ((33, 80), (3, 25)):
        packed = quantize_weight(gaussian(*shape), QuantConfig())
        assert logical_numel(packed) == math.prod(shape) > packed.numel()
    assert logical_numel(torch.empty(3, 4)) == 12


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "double"), FORMATS)
@pytest.mark.parametrize("columns", IN_FEATURES)
def test_cuda_dequantize_and_layer(columns: int, kind: str, double: bool) -> None:
    """The same bits on both devices, and the CUDA kernel against the plain reference."""
    for rows in (64, 33):
        dense = gaussian(rows, columns, seed=columns)
        on_cpu = quantize_weight(dense, QuantConfig(kind, double))
        stored = {key: tensor.cpu() for key, tensor in packed_tensors(on_cpu).items()}
        moved = unpack_tensors(stored, torch.device("cuda"))
        expected = reference.dequantize(on_cpu)
        assert relative_error(dequantize_weight(moved, torch.float32).cpu(), expected) < FP32_TOLERANCE
        assert relative_error(dequantize_weight(moved, torch.bfloat16).cpu(), expected) < BF16_ROUNDING
        on_cuda = quantize_weight(dense.cuda(), QuantConfig(kind, double))
        error = relative_error(dequantize_weight(on_cuda, torch.float32).cpu(), dense)
        assert error == pytest.approx(relative_error(expected, dense), rel=0.01)
        x = gaussian(5, columns).cuda().requires_grad_()
        y = frozen_linear(x, Linear4bit(moved, None))
        y.sum().backward()
        assert x.grad is not None
        assert relative_error(y.cpu(), x.detach().cpu() @ expected.T) < 1e-3  # TF32 would show as 1e-3
        assert relative_error(x.grad.cpu(), expected.sum(0).expand(5, columns)) < 1e-3
