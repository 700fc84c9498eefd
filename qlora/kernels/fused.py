"""Fused kernels: the elementwise work between matrix products, in one pass over memory each.

In plain torch the elementwise half of a LLaMA block takes as long as its products, since each of a dozen steps
reads and writes whole tensors. Here each operation is one function, computed by

    a CPU with a C compiler    fused.c, compiled once for this machine (about a second) and cached
    CUDA with triton           the plain version below through torch.compile
    anything else              the plain version

The plain versions are the reference: sums in fp32, results rounded to the tensors' dtype. The kernels never round
more often, so they agree to one or two ulps of that dtype (tests/kernels/test_fused.py).

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

from qlora.kernels.compile import compile_c

SOURCE = Path(__file__).parent / "csrc" / "fused.c"


# ---- the library ------------------------------------------------------------------------------------------


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """fused.c compiled for tensors of `dtype`; None if that is not possible."""
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    return compile_c(SOURCE, *(["-DBF16"] if dtype == torch.bfloat16 else []))


def kernel(name: str, x: Tensor) -> Callable[..., int] | None:
    """The C function for tensors like `x`, or None if only the plain version applies.

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


def check_fits(dtype: torch.dtype, **others: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check tensors that a kernel reads by address; None stands for no tensor.

    Raises:
        ValueError: names the first that does not fit; the kernel would read past its end.
    """
    for name, (tensor, shape) in others.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} in {tensor.dtype} does not fit: it should be {shape} in {dtype}."
            )


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
    check_fits(x.dtype, delta=(delta, x.shape), weight=(weight, x.shape[1:]))
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
    """Gradient of `add_norm` for x; the gradient for delta is the same.

    Args:
        dy, dsum: (N, D) gradients of y and of sum; dsum None: zero.
        total, r: sum and r of the forward pass.
    """
    run = kernel("norm_backward", dy)
    if run is None:
        return _for_device(plain_norm_backward, dy)(dy, dsum, total, weight, r)
    check_fits(dy.dtype, dsum=(dsum, dy.shape), sum=(total, dy.shape), weight=(weight, dy.shape[1:]))
    check_fits(torch.float32, r=(r, dy.shape[:1]))
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
    check_fits(gate.dtype, up=(up, gate.shape))
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
    check_fits(dy.dtype, gate=(gate, dy.shape), up=(up, dy.shape))
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
        targets: (N,) int64, each below V.
    Returns:
        (N,) fp32 in nats; (N, V) in the logits' dtype.
    Raises:
        IndexError: a target that is not an index of a row (on a CPU; CUDA's own check ends the process).
        ValueError: targets of another shape or dtype.
    """
    run = kernel("cross_entropy", logits)
    if run is None:
        return tuple(_for_device(plain_cross_entropy, logits)(logits, targets))  # type: ignore[return-value]
    num_rows, size = logits.shape
    if targets.shape != (num_rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets {tuple(targets.shape)} in {targets.dtype} should be ({num_rows},) in int64.")
    least, most = (bound.item() for bound in targets.aminmax()) if num_rows else (0, 0)
    if least < 0 or most >= size:
        raise IndexError(f"target {least if least < 0 else most} is outside a row of {size} logits.")
    loss = torch.empty(len(logits), dtype=torch.float32)
    run(logits, targets, loss, *logits.shape)
    return loss, logits
