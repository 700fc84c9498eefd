"""An MLP over slices of the tokens, so that a long sequence holds one slice's activations at a time.

An MLP computes each token alone. With z (N, D) cut into slices z_s, f the MLP and p its trained parameters:

    forward    y_s = f(z_s)
    backward   f(z_s) is computed again with a graph; dz_s = dy_s df/dz_s;  dp = sum over s of dy_s df/dp

Only z is kept. Of a block with F = 3 D, gate, up, the activation and their gradients are 18 of the 25 D that a
recomputed layer holds; in slices they are a constant.

Inside torch's checkpoint a layer runs twice: once without activations, and again in the backward pass, where it
stops as soon as everything that was saved exists again. So z is saved by a function of its own, `Keep`, before the
first slice is computed: the second run ends there, and each slice is computed twice in all, not three times. dp is
summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SLICE_TOKENS = 4096


class Keep(torch.autograd.Function):
    """z itself; saves it, for `SlicedMLP`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Tensor:  # type: ignore[override]
        return dz


class SlicedMLP(torch.autograd.Function):
    """f(z) for z that comes from `Keep`; formulas in the module docstring.

    Args:
        z: (N, D); forward: f, called with (module, (n, D)).
        parameters: of the module, those that train.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, z: Tensor, kept: Any, forward: Callable[..., Tensor], module: nn.Module, *parameters: Tensor
    ) -> Tensor:
        ctx.kept, ctx.call, ctx.parameters = kept, (forward, module), parameters
        on_cuda = z.is_cuda and torch.cuda.is_initialized()
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state(z.device) if on_cuda else None
        y = torch.empty_like(z)
        for source, target in zip(z.split(SLICE_TOKENS), y.split(SLICE_TOKENS), strict=True):
            target.copy_(forward(module, source))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (z,) = ctx.kept.saved_tensors
        forward, module = ctx.call
        dz = torch.empty_like(z)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        of_cpu, of_cuda = ctx.random
        with torch.random.fork_rng(devices=[] if of_cuda is None else [z.device]), torch.enable_grad():
            torch.set_rng_state(of_cpu)
            if of_cuda is not None:
                torch.cuda.set_rng_state(of_cuda, z.device)
            for source, dy_s, dz_s in zip(*(t.split(SLICE_TOKENS) for t in (z, dy, dz)), strict=True):
                source = source.detach().requires_grad_()
                leaves = [source, *ctx.parameters]
                found = torch.autograd.grad(forward(module, source), leaves, dy_s, allow_unused=True)
                dz_s.copy_(found[0])
                for index, gradient in enumerate(found[1:]):
                    if gradient is not None:
                        total = sums[index]
                        sums[index] = gradient.float() if total is None else total.add_(gradient)
        return dz, None, None, None, *sums


def mlp_in_slices(forward: Callable[..., Tensor], module: nn.Module, z: Tensor) -> Tensor:
    """f(z), a slice at a time if there is more than one; (N, D) -> (N, D).

    With dropout the masks are drawn slice by slice, so they differ from those of the whole.
    """
    if len(z) <= SLICE_TOKENS:
        return forward(module, z)
    parameters = [p for p in module.parameters() if p.requires_grad]
    z = Keep.apply(z) if z.requires_grad else Keep.apply(z.requires_grad_())
    y: Tensor = SlicedMLP.apply(z, z.grad_fn, forward, module, *parameters)
    return y
