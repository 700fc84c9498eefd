"""The update s B A drop(x) by itself, for a layer that is called as it is: y = layer(x) + s B A drop(x).

Every process holds A (R, I) and B (O, R) whole. If it holds a part of the weight (`LinearShape.part`):

    columns     x (N, I / P)      h = sum over processes of x A_own^T           y whole
    rows        x (N, I)          h = x A^T           y (N, O / P) = h B_own^T

and the gradients of whatever is used in parts (A_own, B_own, and h under rows) are summed over the processes. So
A and B get their whole gradient in each of them. If the layer gathers its output, or splits its input itself, both
are whole, and each process computes the whole update.

N tokens, I inputs, O outputs, R rank, P processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.quant.linear import LinearShape
from qlora.quant.parts import Part, SumGradient, SumOutput
from qlora.system.errors import InputError


def own_factors(lora_A: Tensor, lora_B: Tensor, part: Part | None) -> tuple[Tensor, Tensor]:
    """The factors that a layer with part of its weight uses: its rows of B or columns of A, the other whole."""
    if part is None:
        return lora_A, lora_B
    return (lora_A, part.of(lora_B)) if part.dim == 0 else (part.of(lora_A), lora_B)


def drop(x: Tensor, dropout: float, part: Part | None) -> tuple[Tensor, Tensor]:
    """(x * m, the bool mask (N, I)); for part of an input, that part of the whole input's mask."""
    if part is None or part.dim == 0:
        return torch.native_dropout(x, dropout, True)
    _, mask = torch.native_dropout(x.new_empty(part.whole_shape(x.shape)), dropout, True)
    mask = part.of(mask).contiguous()
    return x * mask / (1 - dropout), mask


def update(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float, shape: LinearShape
) -> Tensor:
    """(..., O or a part) s B A drop(x) for a layer with output `y`, in x's dtype.

    Args:
        x: (..., I or a part), the layer's input.
    Raises:
        InputError: x and y are not an input and an output of a layer of this shape.
    """
    _check(x, y, shape)
    part = shape.part
    of_x = part if part is not None and part.dim == 1 and x.shape[-1] != shape.in_features else None
    of_y = part if part is not None and part.dim == 0 and y.shape[-1] != shape.out_features else None
    A, B = A.to(x.dtype), B.to(x.dtype)
    if of_x is not None:
        A = of_x.of(SumGradient.apply(A, shape.group))
    if of_y is not None:
        B = of_y.of(SumGradient.apply(B, shape.group))
    h = F.linear(_dropped(x, dropout, of_x), A)
    if of_x is not None:
        h = SumOutput.apply(h, shape.group)
    if of_y is not None:
        h = SumGradient.apply(h, shape.group)
    return scaling * F.linear(h, B)


def update_of_own_part(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float, part: Part | None
) -> Tensor:
    """(..., O or a part) the update of one of our layers; with split columns a partial sum, as its output is."""
    A, B = own_factors(A, B, part)
    return scaling * F.linear(F.linear(_dropped(x, dropout, part), A.to(x.dtype)), B.to(x.dtype))


def _dropped(x: Tensor, dropout: float, part: Part | None) -> Tensor:
    return x if dropout == 0 else drop(x.reshape(-1, x.shape[-1]), dropout, part)[0].view(x.shape)


def _check(x: Tensor, y: Tensor, shape: LinearShape) -> None:
    part = shape.part
    inputs, outputs = {shape.in_features}, {shape.out_features}
    if part is not None:
        (outputs if part.dim == 0 else inputs).add((shape.out_features, shape.in_features)[part.dim] // part.count)
    if x.shape[:-1] != y.shape[:-1] or x.shape[-1] not in inputs or y.shape[-1] not in outputs:
        raise InputError(
            f"A layer of shape {shape.out_features, shape.in_features} turned {tuple(x.shape)} into "
            f"{tuple(y.shape)}, which LoRA cannot follow; turn sequence parallelism off, or correct its "
            "register_linear."
        )
