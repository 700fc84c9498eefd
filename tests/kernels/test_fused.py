"""The fused kernels against their plain versions and against torch's own functions, values and gradients."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from qlora.kernels import fused as kernels
from qlora.kernels import packed_attention
from qlora.kernels.packed_attention import PackedAttention

DTYPES = [torch.float32, torch.bfloat16]
# One rounding to the dtype more or less: 2^-8 of a bf16 value; in fp32 sums of a thousand terms in another order.
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-9}}

pytestmark = pytest.mark.skipif(kernels.library(torch.float32) is None, reason="no C compiler here")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual: object, expected: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8, 100, 576])
def test_add_norm_and_its_gradient(dtype: torch.dtype, columns: int) -> None:
    x, delta, dy, dsum = (random(33, columns, dtype=dtype, seed=i) for i in range(4))
    weight = random(columns, dtype=dtype, seed=4)
    for added in (delta, None):
        fused, plain = (f(x, added, weight, 1e-5) for f in (kernels.add_norm, kernels.plain_add_norm))
        assert_same(fused, plain, dtype)
        for residual in (dsum, None):
            arguments = (dy, residual, plain[0], weight, plain[2])
            assert_same(kernels.norm_backward(*arguments), kernels.plain_norm_backward(*arguments), dtype)


def test_plain_add_norm_is_transformers_norm_and_autograd() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, delta, dy, dsum = (random(7, 32, dtype=torch.float32, seed=i) for i in range(4))
    norm = LlamaRMSNorm(32, eps=1e-5)
    norm.weight.data = random(32, dtype=torch.float32, seed=4)
    total = (x + delta).requires_grad_()
    y = norm(total)
    (y * dy + total * dsum).sum().backward()
    assert total.grad is not None
    fused_total, fused_y, r = kernels.plain_add_norm(x, delta, norm.weight.detach(), 1e-5)
    torch.testing.assert_close(fused_y, y.detach())
    gradient = kernels.plain_norm_backward(dy, dsum, fused_total, norm.weight.detach(), r)
    torch.testing.assert_close(gradient, total.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    gate, up, dy = (10 * random(17, 90, dtype=dtype, seed=i) for i in range(3))
    gate[0, :4] = torch.tensor([-200.0, -90.0, 90.0, 200.0])  # where e^x leaves fp32's range
    assert_same(kernels.swiglu(gate, up), kernels.plain_swiglu(gate, up), dtype)
    assert_same(kernels.swiglu_backward(dy, gate, up), kernels.plain_swiglu_backward(dy, gate, up), dtype)


def test_plain_swiglu_gradient_is_autograds() -> None:
    gate, up, dy = (random(5, 9, dtype=torch.float32, seed=i) for i in range(3))
    gate.requires_grad_(), up.requires_grad_()
    (F.silu(gate) * up).backward(dy)
    torch.testing.assert_close(kernels.plain_swiglu_backward(dy, gate.detach(), up.detach()), (gate.grad, up.grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    logits = (5 * random(9, 1000, dtype=dtype)).requires_grad_()
    logits.data[0, 3] = 300.0  # one token takes it all
    targets = torch.arange(9) * 100
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    expected.sum().backward()
    assert logits.grad is not None
    for function in (kernels.plain_cross_entropy, kernels.cross_entropy):
        losses, gradient = function(logits.detach().clone(), targets)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
        assert_same(gradient, logits.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(dtype: torch.dtype, bad: float) -> None:
    """A step with such a loss is skipped: a kernel that made a number of it would train on garbage."""
    x = random(3, 70, dtype=dtype)
    x[1, 5] = bad
    ones = torch.ones(70, dtype=dtype)
    assert not kernels.add_norm(x, None, ones, 1e-5)[1][1].isfinite().all()
    losses, gradient = kernels.cross_entropy(x.clone(), torch.tensor([0, 0, 0]))
    assert losses.isfinite().tolist() == [True, False, True] and not gradient[1].isfinite().any()
    assert not kernels.swiglu(x, x)[1].isfinite().all()


ATTENTION = {  # heads, key-value heads, window, lengths; a block has 48 queries
    "grouped": (6, 2, None, (1, 7, 130)),
    "several blocks": (4, 2, None, (256, 257, 600)),
    "ungrouped": (3, 3, None, (40, 300)),
    "window": (4, 1, 50, (20, 51, 420)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION)
def test_packed_attention_is_rotation_and_sdpa(case: str, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, kv_heads, window, lengths = ATTENTION[case]
    d, count = 16, sum(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    angles = torch.cat([torch.arange(n) for n in lengths])[:, None] * 0.5 ** torch.arange(d // 2)
    cosine, sine = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))
    q, k, v = (random(count, n * d, dtype=dtype, seed=n) for n in (heads, kv_heads, kv_heads))
    dout = random(count, heads * d, dtype=dtype, seed=99)

    def run(attend: object, to: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(to).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(to))]

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.view(1, count, -1, d).transpose(1, 2) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, cosine.to(q.dtype)[None], sine.to(q.dtype)[None])
        outputs = []
        for a, b, c in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
            position = torch.arange(a.shape[2])
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < (window or count))
            outputs.append(F.scaled_dot_product_attention(a, b, c, mask, scale=0.3, enable_gqa=True))
        return torch.cat(outputs, dim=2).transpose(1, 2).reshape(count, -1)

    settings = (cosine, sine, bounds, d, 0.3, window or count)
    actual = run(lambda *x: PackedAttention.apply(*x, *settings), dtype)
    exact = run(reference, torch.float64)
    for ours, right in zip(actual, exact, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
        else:  # scores are rounded to bf16, as transformers' eager attention rounds them
            assert (ours.double() - right).norm() < 1e-2 * right.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_without_memory_is_an_error(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads wrote to a null pointer where calloc gave them none: about one run in thirty near a memory limit.

    A head of 2^31 tokens and 65,536 features takes a petabyte, more than any address space.
    """
    monkeypatch.setattr(packed_attention, "check_bounds", lambda *_: None)  # such bounds take as large a tensor
    d, most = 2**16, 2**31 - 1
    bounds, x = torch.tensor([0, most], dtype=torch.int32), torch.zeros(1, d, dtype=dtype, requires_grad=True)
    settings = (1.0, 1, 1, 1, d, most)
    with pytest.raises(MemoryError, match="out of memory in the attention kernel"):
        PackedAttention.apply(x, x, x, x, x, bounds, d, 1.0, most)
    context = SimpleNamespace(saved_tensors=(x, x, x, x, x, bounds), settings=settings)
    with pytest.raises(MemoryError, match="out of memory in the attention kernel"):
        PackedAttention.backward(context, x)


def test_without_a_compiler_the_plain_versions_run(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    command = (
        "import torch; from qlora.kernels import fused as kernels; x = torch.randn(3, 8);"
        "assert kernels.library(torch.float32) is None and kernels.kernel('swiglu', x) is None;"
        "assert torch.equal(kernels.swiglu(x, x), kernels.plain_swiglu(x, x))"
    )
    environment = {"CC": "false", "QLORA_CACHE": str(tmp_path), "PATH": "", "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", command], env=environment, check=True)
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_versions_on_cuda(dtype: torch.dtype) -> None:
    x, delta, weight = (random(33, 96, dtype=dtype, seed=i) for i in range(3))
    fused = kernels.add_norm(x.cuda(), delta.cuda(), weight[0].cuda(), 1e-5)
    assert_same([t.cpu() for t in fused], list(kernels.plain_add_norm(x, delta, weight[0], 1e-5)), dtype)
    fused = kernels.swiglu_backward(x.cuda(), delta.cuda(), weight.cuda())
    assert_same([t.cpu() for t in fused], list(kernels.plain_swiglu_backward(x, delta, weight)), dtype)
    fused = kernels.cross_entropy(x.cuda(), torch.arange(33).cuda())
    assert_same([t.cpu() for t in fused], list(kernels.plain_cross_entropy(x, torch.arange(33))), dtype)
