"""What reaches a C kernel is bounded before it: wrong indices and shapes are errors, never a read past a tensor.

tests/robustness/test_sanitized.py runs this file under AddressSanitizer too, where one missing check ends it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qlora.data.example import IGNORE_INDEX
from qlora.kernels import fused as kernels
from qlora.kernels import gemm
from qlora.kernels.gemv import product_4bit, product_16bit
from qlora.kernels.packed_attention import PackedAttention
from qlora.model.loss import linear_cross_entropy
from qlora.quant.weight import QuantConfig, quantize_weight
from tests.kernels.test_fused import DTYPES

pytestmark = pytest.mark.skipif(kernels.library(torch.float32) is None, reason="no C compiler here")
FAR = [300, 301, 2**31, 2**62, -1, -101, -(2**40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", FAR)
def test_a_target_beyond_its_row_of_logits(dtype: torch.dtype, target: int) -> None:
    """The eos of a tokenizer with more tokens than the embedding has rows: it trained to the end."""
    logits, targets = torch.zeros(4, 300, dtype=dtype), torch.tensor([0, 299, target, 5])
    with pytest.raises(IndexError, match=str(target)):
        kernels.cross_entropy(logits, targets)
    assert not logits.any()  # refused before anything was written
    if target != IGNORE_INDEX:
        with pytest.raises(IndexError):
            linear_cross_entropy(torch.zeros(4, 64, dtype=dtype), torch.zeros(300, 64).bfloat16(), targets)


def test_targets_of_another_kind_or_number() -> None:
    logits = torch.zeros(4, 300)
    for targets in (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(4, 1).long(),
    ):
        with pytest.raises(ValueError, match="targets"):
            kernels.cross_entropy(logits, targets)
    assert kernels.cross_entropy(torch.zeros(0, 300), torch.zeros(0, dtype=torch.int64))[0].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_another_shape_or_dtype(dtype: torch.dtype) -> None:
    x, other = torch.zeros(6, 32, dtype=dtype), next(d for d in DTYPES if d != dtype)
    r, w = torch.ones(6), torch.ones(32, dtype=dtype)
    shorter, narrower, wider = x[:5].clone(), torch.zeros(6, 31, dtype=dtype), x.to(other)
    for bad in (shorter, narrower, wider):
        for call in (
            lambda bad=bad: kernels.add_norm(x, bad, w, 1e-5),
            lambda bad=bad: kernels.norm_backward(x, bad, x, w, r),
            lambda bad=bad: kernels.norm_backward(x, None, bad, w, r),
            lambda bad=bad: kernels.swiglu(x, bad),
            lambda bad=bad: kernels.swiglu_backward(x, x, bad),
        ):
            with pytest.raises(ValueError, match="does not fit"):
                call()
    for weight in (w[:31].clone(), w.to(other)):
        with pytest.raises(ValueError, match="does not fit"):
            kernels.add_norm(x, None, weight, 1e-5)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.norm_backward(x, None, x, w, r[:5].clone())


def attend(bounds: list[int], d: int = 16, count: int = 40, window: int = 40, **changed: Any) -> torch.Tensor:
    q, kv = torch.zeros(count, 4 * d), torch.zeros(count, 2 * d)
    given = {"query": q, "key": kv, "value": kv, "cosine": q[:, :d].contiguous(), "sine": q[:, :d].contiguous()}
    limits = torch.tensor(bounds, dtype=changed.pop("dtype", torch.int32))
    return PackedAttention.apply(*(given | changed).values(), limits, d, 1.0, window)  # type: ignore[no-any-return]


def test_bounds_of_sequences() -> None:
    assert attend([0, 3, 40]).shape == (40, 64)
    for bounds in ([0, 41], [0, 39], [1, 40], [0, 30, 20, 40], [-1, 40], [0, 50, 40], [0, 2**31 - 1], [0], []):
        with pytest.raises(IndexError, match="bounds"):
            attend(bounds)
    with pytest.raises(ValueError, match="bounds"):
        attend([0, 40], dtype=torch.int64)
    with pytest.raises(ValueError, match="window"):
        attend([0, 40], window=0)


def test_attention_of_another_shape() -> None:
    for name in ("key", "value", "cosine", "sine"):
        width = 32 if name in ("key", "value") else 16
        for bad in (torch.zeros(39, width), torch.zeros(40, width // 2 - 1), torch.zeros(40, width).bfloat16()):
            with pytest.raises(ValueError, match="does not fit"):
                attend([0, 40], **{name: bad})
    with pytest.raises(ValueError, match="does not fit"):
        attend([0, 40], query=torch.zeros(40, 48), key=torch.zeros(40, 32), value=torch.zeros(40, 32))


def test_products_with_too_few_codes() -> None:
    """A 4-bit weight whose parts are shorter than its shape says."""
    for double_quant in (True, False):
        weight = quantize_weight(torch.randn(64, 128), QuantConfig(double_quant=double_quant))
        codes, state = weight.data, weight.quant_state
        short = codes[:-1].clone()
        for dtype in DTYPES:
            with pytest.raises(ValueError, match="does not fit"):
                product_4bit(short, state, None, dtype)
        state.absmax = state.absmax[:-1].clone()
        with pytest.raises(ValueError, match="does not fit"):
            product_4bit(codes, state, None, torch.float32)


def test_products_with_rows_of_another_width() -> None:
    weight = quantize_weight(torch.randn(64, 128), QuantConfig())
    multiply = product_4bit(weight.data, weight.quant_state, None, torch.float32)
    dense = torch.zeros(64, 128).bfloat16()
    multiply16 = product_16bit(dense, None)
    assert multiply is not None and multiply16 is not None
    for x in (torch.zeros(1, 64), torch.zeros(2, 96), torch.zeros(1, 256)):
        for function in (multiply, multiply16):
            with pytest.raises(ValueError, match="does not fit"):
                function(x)


@pytest.mark.skipif(gemm.library(torch.zeros(1)) is None, reason="no AVX-512 or no GCC")
def test_products_of_a_step() -> None:
    weight = quantize_weight(torch.randn(64, 128), QuantConfig())
    codes, state, x = weight.data, weight.quant_state, torch.zeros(9, 128)
    dense = torch.zeros(64, 128).bfloat16()
    for call in (
        lambda: gemm.multiply_4bit(x, codes[:-1].clone(), lambda state: torch.ones(128), state, None, False),
        lambda: gemm.multiply_4bit(x, codes, lambda state: torch.ones(127), state, None, False),
        lambda: gemm.multiply_16bit(x, dense, torch.zeros(63), False),
        lambda: gemm.multiply_16bit(x[:, :64], dense, None, False),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            call()


def test_random_batches_are_right_or_refused() -> None:
    """Fuzzing: targets and bounds with one number changed at random, 300 times."""
    draw, refused = random.Random(0), 0
    for _ in range(300):
        count, cut = draw.randint(1, 40), draw.randint(0, 39)
        bounds, targets = sorted({0, min(cut, count), count}), [draw.randrange(300) for _ in range(count)]
        number = draw.choice([0, 1, count - 1, count, count + 1, 299, 300, -1, 2**31 - 1, draw.getrandbits(62)])
        wrong = draw.choice([bounds, targets])
        wrong[draw.randrange(len(wrong))] = min(number, 2**31 - 1) if wrong is bounds else number
        try:
            out = attend(bounds, count=count, window=draw.choice([1, 5, 2**40]))
            losses = kernels.cross_entropy(torch.zeros(count, 300), torch.tensor(targets))[0]
        except IndexError:
            refused += 1
            continue
        assert out.isfinite().all() and torch.allclose(losses, torch.tensor(300.0).log())
    assert 30 < refused < 270
