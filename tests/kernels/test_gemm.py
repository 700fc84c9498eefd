"""Products from the stored weight against products with the dequantized one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora.kernels import gemm as many_rows
from qlora.quant.layers import Linear4bit, Linear16bit, dense_weight, multiply
from qlora.quant.parts import Part, cut_weight
from qlora.quant.weight import QuantConfig, quantize_weight
from tests.reference import relative_error

DTYPES = (torch.float32, torch.bfloat16)
BF16_ROUNDING = 2**-8
# fp32: sums of up to 4,160 terms in another order
FP32_TOLERANCE = 2e-6
KINDS = [("nf4", True, 64), ("fp4", False, 64), ("nf4", False, 128), ("16bit", False, 0)]
# (N, rows, columns): one row; ragged panels and tiles; more rows than share a panel; sums over several depths
SHAPES = [(1, 2, 128), (5, 70, 128), (13, 66, 256), (1541, 64, 128), (9, 130, 2176), (7, 4160, 128)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    kind: str, double: bool, block_size: int, rows: int, columns: int, bias: bool = False
) -> torch.nn.Module:
    dense, offset = gaussian(rows, columns, seed=1), gaussian(rows, seed=2) if bias else None
    if kind == "16bit":
        return Linear16bit(dense.to(torch.bfloat16), offset)
    return Linear4bit(quantize_weight(dense, QuantConfig(kind, double, block_size)), offset)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if many_rows.library(torch.empty(0, dtype=request.param)) is None:
        pytest.skip("no kernel for this processor")
    return request.param


@pytest.mark.parametrize(("kind", "double", "block_size"), KINDS)
@pytest.mark.parametrize(("n", "rows", "columns"), SHAPES)
def test_products(
    n: int, rows: int, columns: int, kind: str, double: bool, block_size: int, dtype: torch.dtype
) -> None:
    """Against fp64 on the dequantized weight; bf16 rounds the result and sums pairs in one step."""
    layer = make_layer(kind, double, block_size, rows, columns, bias=True)
    x, dy = gaussian(n, columns, seed=3).to(dtype), gaussian(n, rows, seed=4).to(dtype)
    weight, bias = dense_weight(layer, dtype).double(), layer.bias.to(dtype)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_ROUNDING
    y = stored(x, layer, bias)
    assert relative_error(y, x.double() @ weight.T + bias.double()) < tolerance
    dx = stored(dy, layer, backward=True)
    assert relative_error(dx, dy.double() @ weight) < tolerance


def stored(x: Tensor, layer: torch.nn.Module, bias: Tensor | None = None, backward: bool = False) -> Tensor:
    """`multiply`, which must not have dequantized anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora.quant.layers.dequantize_into_scratch", None)
        return multiply(x, layer, bias, backward)


@pytest.mark.parametrize(("kind", "double", "block_size"), KINDS)
def test_each_weight_has_the_bits_of_the_dequantized_one(
    kind: str, double: bool, block_size: int, dtype: torch.dtype
) -> None:
    """One times a weight, and nothing else but zeros, is that weight."""
    layer = make_layer(kind, double, block_size, 102, 1280)
    weight = dense_weight(layer, dtype)
    assert torch.equal(stored(torch.eye(1280, dtype=dtype), layer), weight.T)
    assert torch.equal(stored(torch.eye(102, dtype=dtype), layer, backward=True), weight)


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_weight(dim: int, dtype: torch.dtype) -> None:
    """Tensor parallelism: the scales' groups run over the whole weight."""
    whole = quantize_weight(gaussian(96, 384), QuantConfig())
    layers = [Linear4bit(cut_weight(whole, Part(dim, index, 3)), None) for index in range(3)]
    weights = [stored(torch.eye(layer.in_features, dtype=dtype), layer).T for layer in layers]
    assert torch.equal(torch.cat(weights, dim), dense_weight(Linear4bit(whole, None), dtype))


def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    layer = make_layer("nf4", True, 64, 130, 2176)
    x = gaussian(1600, 2176).to(dtype)
    together = stored(x, layer)
    for rows in (slice(0, 1), slice(5, 12), slice(1000, 1600)):
        assert torch.equal(stored(x[rows], layer), together[rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(stored(x, layer), together)
    finally:
        torch.set_num_threads(before)


def test_no_rows(dtype: torch.dtype) -> None:
    """An expert that no token chose."""
    layer = make_layer("nf4", True, 64, 70, 128)
    assert stored(torch.empty(0, 128, dtype=dtype), layer).shape == (0, 70)
    assert stored(torch.empty(0, 70, dtype=dtype), layer, backward=True).shape == (0, 128)


def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    layer = make_layer("nf4", True, 64, 64, 128)
    x = gaussian(8, 128).to(dtype)
    x[3, 7], x[5, 9] = float("nan"), float("inf")
    y = stored(x, layer)
    assert y[3].isnan().all() and not y[5].isfinite().any() and y[[0, 1, 2, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("kind", ["4bit", "16bit"])
def test_other_shapes_are_dequantized(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks across rows, an odd number of bf16 to sum, fp16, no compiler: the same numbers by the other way."""
    kinds = ("nf4", True, 64) if kind == "4bit" else ("16bit", False, 0)

    def check(rows: int, columns: int, dtype: torch.dtype, backward: bool) -> None:
        layer = make_layer(*kinds, rows, columns)
        x = gaussian(4, rows if backward else columns).to(dtype)
        weight = dense_weight(layer, dtype).double()
        right = x.double() @ (weight if backward else weight.T)
        assert relative_error(multiply(x, layer, backward=backward), right) < 2 * BF16_ROUNDING

    check(8, 80, torch.float32, False)
    check(33, 128, torch.bfloat16, True)
    check(8, 128, torch.float16, False)
    monkeypatch.setattr(many_rows, "compile_c", lambda *_: None)
    for backward in (False, True):
        check(8, 128, torch.bfloat16, backward)
