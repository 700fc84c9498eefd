"""Fused kernels: the work between the matrix products, in one pass over memory each.

In plain torch the elementwise half of a LLaMA block takes as long as its products, for each of a dozen steps reads
and writes whole tensors. Here each is one function, computed by

    a CPU with a C compiler    kernels.c, compiled for this machine once (about a second) and kept in the cache
    CUDA with triton           the plain version below through torch.compile
    anything else              the plain version

The plain versions are the definition: sums in fp32, and the result rounded to the tensors' dtype. The kernels
round no oftener than they do, so that they agree to an ulp or two of that dtype (tests/test_kernels.py).

Letters: N tokens, D features, F the MLP's width, V vocabulary. Tensors are bf16 or fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.native import compile_c

SOURCE = Path(__file__).with_name("kernels.c")
NO_SCRATCH = "out of memory in the attention kernel"


# ---- the library ------------------------------------------------------------------------------------------


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """kernels.c compiled for tensors of `dtype`; None where that cannot be."""
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    return compile_c(SOURCE, *(["-DBF16"] if dtype == torch.bfloat16 else []))


def kernel(name: str, x: Tensor) -> Callable[..., int] | None:
    """The C function for tensors like `x`, or None where the plain version has to do.

    Tensors are passed by address (None as null), ints as C long, floats as C float; the result is a C int.
    """
    compiled = library(x.dtype) if x.device.type == "cpu" else None
    if compiled is None:
        return None
    function = getattr(compiled, name)

    def call(*arguments: Any) -> int:
        return int(function(*(_as_c(argument) for argument in arguments)))

    return call


def _as_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p()
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)


@cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(plain, dynamic=True)


def _for_device(plain: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    if not x.is_cuda:
        return plain
    from torch.utils._triton import has_triton

    return _compiled(plain) if has_triton() else plain


# ---- RMSNorm ----------------------------------------------------------------------------------------------


def plain_add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """sum = x + delta; r = 1 / sqrt(mean(sum^2) + eps); y = w * (sum r), rounded before w as transformers does."""
    total = x if delta is None else x + delta
    r = torch.rsqrt(total.float().square().mean(-1) + eps)
    return total, weight * (total.float() * r[:, None]).to(x.dtype), r


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and RMSNorm (arXiv 1910.07467).

    Args:
        x, delta: (N, D); delta None: nothing is added.
        weight: (D,) in x's dtype.
    Returns:
        sum (N, D), `x` itself without delta; y (N, D); r (N,) fp32.
    """
    run = kernel("add_norm", x)
    if run is None:
        return tuple(_for_device(plain_add_norm, x)(x, delta, weight, eps))  # type: ignore[return-value]
    total = x if delta is None else torch.empty_like(x)
    y, r = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32)
    run(x, delta, weight, eps, total, y, r, *x.shape)
    return total, y, r


def plain_norm_backward(dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """dx = dsum + r (g - h mean(g h)), with g = dy w and h = sum r."""
    g, h = dy.float() * weight.float(), total.float() * r[:, None]
    dx = r[:, None] * (g - h * (g * h).mean(-1, keepdim=True))
    return (dx if dsum is None else dsum.float() + dx).to(dy.dtype)


def norm_backward(dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """Gradient of `add_norm` for x (and for delta: it is the same).

    Args:
        dy, dsum: (N, D) gradients of y and of sum; dsum None: zero.
        total, r: sum and r of the forward pass.
    """
    run = kernel("norm_backward", dy)
    if run is None:
        return _for_device(plain_norm_backward, dy)(dy, dsum, total, weight, r)
    dx = torch.empty_like(dy)
    run(dy, dsum, total, weight, r, dx, *dy.shape)
    return dx


# ---- SwiGLU -----------------------------------------------------------------------------------------------


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) up"""
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The MLP's activation (arXiv 2002.05202), (N, F) each."""
    run = kernel("swiglu", gate)
    if run is None:
        return _for_device(plain_swiglu, gate)(gate, up)
    y = torch.empty_like(gate)
    run(gate, up, y, *gate.shape)
    return y


def plain_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, with s = sigmoid(gate)"""
    g, dyf = gate.float(), dy.float()
    s = torch.sigmoid(g)
    return (dyf * up.float() * s * (1 + g * (1 - s))).to(dy.dtype), (dyf * g * s).to(dy.dtype)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (N, F) each."""
    run = kernel("swiglu_backward", dy)
    if run is None:
        return tuple(_for_device(plain_swiglu_backward, dy)(dy, gate, up))  # type: ignore[return-value]
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    run(dy, gate, up, dgate, dup, *gate.shape)
    return dgate, dup


# ---- cross-entropy ----------------------------------------------------------------------------------------


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """loss = logsumexp(z) - z[target]; dz = softmax(z) - onehot(target)"""
    log_p = torch.log_softmax(logits.float(), dim=1)
    loss = -log_p.gather(1, targets[:, None])[:, 0]
    p = log_p.exp()
    return loss, p.scatter_add(1, targets[:, None], p.new_full((len(p), 1), -1.0)).to(logits.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient.

    Args:
        logits: (N, V); the CPU kernel writes the gradient into it.
        targets: (N,) int64.
    Returns:
        (N,) fp32 in nats; (N, V) in the logits' dtype.
    """
    run = kernel("cross_entropy", logits)
    if run is None:
        return tuple(_for_device(plain_cross_entropy, logits)(logits, targets))  # type: ignore[return-value]
    loss = torch.empty(len(logits), dtype=torch.float32)
    run(logits, targets, loss, *logits.shape)
    return loss, logits


# ---- attention --------------------------------------------------------------------------------------------


class PackedAttention(torch.autograd.Function):
    """Rotary embedding and causal attention over packed sequences, on a CPU; nothing but its inputs is kept.

    For one sequence and head, with R queries of a block, C keys that the last of them sees, d = head_dim, s the
    scaling and P the causal softmax by rows; sums and softmax are in fp32 whatever the tensors' dtype:

        forward    S = Q K^T               (R, C)       backward    dP = dO V^T                       (R, C)
                   P = softmax(s S)                                 dS = s P * (dP - rowsum(P * dP))
                   O = P V                 (R, d)                   dQ = dS K      dK = dS^T Q      dV = P^T dO

    P is computed again in the backward pass. Scores exist for a block of queries at a time, and what is above the
    diagonal is left out: half of the work of whole matrices. A processor that multiplies pairs of bf16 gets P and
    dS rounded to bf16 for bf16 tensors, as flash attention does; elsewhere they stay in fp32.

    Args:
        query: (N, heads d); key, value: (N, kv_heads d): before rotation. d a multiple of 16.
        cosine, sine: (N, d) in the query's dtype.
        bounds: (S + 1,) int32, where sequences begin and end.
        window: how many tokens back, itself included, a token sees.
    Raises:
        MemoryError: for a head of the longest sequence and its scores, which each thread holds.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cosine: Tensor,
        sine: Tensor,
        bounds: Tensor,
        head_dim: int,
        scaling: float,
        window: int,
    ) -> Tensor:
        run, out = kernel("attention", query), torch.empty_like(query)
        assert run is not None
        heads = (x.shape[1] // head_dim for x in (query, key))
        settings = scaling, len(bounds) - 1, *heads, head_dim, window
        if run(query, key, value, cosine, sine, bounds, out, *settings):
            raise MemoryError(NO_SCRATCH)
        ctx.save_for_backward(query, key, value, cosine, sine, bounds)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: under checkpointing each access computes the layer again
        gradients = [torch.empty_like(x) for x in saved[:3]]
        run = kernel("attention_backward", dout)
        assert run is not None
        if run(*saved, dout.contiguous(), *gradients, *ctx.settings):
            raise MemoryError(NO_SCRATCH)
        return *gradients, None, None, None, None, None, None
