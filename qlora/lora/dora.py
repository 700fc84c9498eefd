"""DoRA (arXiv 2402.09353): W' = m (W + s B A) / |W + s B A|, each output's magnitude m learned apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora.quant.layers import dense_weight

SMALLEST = torch.finfo(torch.float32).tiny


def with_magnitude(weight: Tensor, magnitude: Tensor | None) -> Tensor:
    """The (out, in) fp32 weight with DoRA's magnitudes for the norms of its rows; None leaves it alone."""
    if magnitude is None:
        return weight
    norms = weight.norm(dim=1).clamp_(min=SMALLEST)
    return weight * (magnitude.detach().float() / norms)[:, None]


def squared_norms(layer: nn.Module) -> Tensor:
    """(out,) fp32 squared norms of the rows of a frozen layer's weight."""
    return dense_weight(layer, torch.float32).square().sum(1)


def rescale(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """y + (scale - 1) z in y's dtype, so y * scale where z is y: a bf16 scale near 1 would be a step of 1/128."""
    return torch.addcmul(y, z, (scale - 1).to(y.dtype))
