"""LoRA on one frozen linear layer (arXiv 2106.09685) and its family, forward and backward in one function.

Shapes: N tokens, I inputs, O outputs, R rank; x (N, I), W (O, I) frozen and possibly 4-bit, A (R, I),
B (O, R), s the scaling, m the dropout mask divided by its keep probability (absent: all ones), * elementwise.

    forward    h = (x * m) A^T                  (N, R)
               z = x W^T + s h B^T              (N, O)
               y = c * z + b                    (N, O)      c = 1, but for DoRA

    backward   g  = c * dy                      (N, O)
               u  = s g B                       (N, R)
               dB = s g^T h                     (O, R)
               dA = u^T (x * m)                 (R, I)
               dx = g W + (u A) * m             (N, I)
               db = sum over N of dy            (O,)        where the bias trains
               dc = sum over N of dy * z        (O,)        DoRA

The family differs in s, c, A and in how A and B start:

    LoRA       s = alpha / R
    rsLoRA     s = alpha / sqrt(R)                              arXiv 2312.03732
    DoRA       c = magnitude / n, n = row norms of W + s B A    arXiv 2402.09353; n counts as a constant (4.3)
    AdaLoRA    (E * A) in the place of A, E (R, 1)              arXiv 2303.10512; see lora/adalora.py
    PiSSA, LoftQ                                                how A and B start; see lora/svd_start.py

n is found without W + s B A (`LoRALinear.weight_norm`), and c is applied as z + (c - 1) z, which keeps c's digits
in bf16. Dropout is on the input of A alone, under DoRA too (PEFT's DoRA then drops W's input in part as well).

What is kept between the two passes: x (shared by every layer that reads it: q, k and v keep one copy), h, the
one-byte mask, and z under DoRA. W is dequantized twice (under DoRA a third time, for n) and kept never; W gets no
gradient; dx is computed only if something below wants it, so the first adapted layer stops the backward pass. A
and B are bf16 but their gradients leave in fp32 (`grad_dtype`), so that accumulating micro-batches loses nothing.

A layer of which a process holds a part (parallel/tensor_parallel.py) has A and B whole, and takes of them what
belongs to its rows (of B) or columns (of A, and of the dropout mask, which is that of the unsplit layer).
Gradients leave whole too, with zeros for what other processes find. Where columns are split, y and h are summands
of the layer's.

The adapted model is the base model until the first step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.lora.adalora import ScaledRows
from qlora.lora.dora import SMALLEST, rescale, squared_norms, with_magnitude
from qlora.quant.layers import dense_weight, dequantize_into_scratch, layer_bias, logical_shape, multiply
from qlora.quant.parts import Part, part_of
from qlora.system.errors import InputError


class LoRAFunction(torch.autograd.Function):
    """Base and adapter together; formulas in the module docstring.

    Args:
        x: (..., I); lora_A (R, I); lora_B (O, R).
        scale: (O,) fp32, DoRA's c; None = ones.
        bias: (O,) or None.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        layer: nn.Module,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        A, B = (factor.to(x.dtype) for factor in own_factors(lora_A, lora_B, part_of(layer)))
        mask = None
        dropped = x2
        if dropout > 0:
            dropped, mask = drop(x2, dropout, part_of(layer))
        h = dropped @ A.T
        offset = None if bias is None else bias.to(x.dtype)
        y = multiply(x2, layer, offset if scale is None else None)
        y.addmm_(h, B.T, alpha=scaling)
        z = None
        if scale is not None:
            z, y = y, rescale(y, y if offset is None else y + offset, scale)
        ctx.save_for_backward(x2, h, mask, lora_A, lora_B, scale, z)
        ctx.layer, ctx.scaling, ctx.keep = layer, scaling, 1 - dropout
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x2, h, mask, lora_A, lora_B, scale, z = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        wants_dx, wants_dA, wants_dB, wants_dc, wants_db = ctx.needs_input_grad[:5]
        part = part_of(ctx.layer)
        lora_A, lora_B = own_factors(lora_A, lora_B, part)
        g = dy2 if scale is None else rescale(dy2, dy2, scale)
        u = ctx.scaling * (g @ lora_B.to(dy.dtype))
        dx = dA = dB = None
        dc = (dy2 * z).sum(0, dtype=torch.float32) if wants_dc else None
        db = dy2.sum(0, dtype=torch.float32) if wants_db else None
        if wants_dB:
            dB = (g.T @ h).float() * ctx.scaling
            dB = dB if part is None or part.dim == 1 else part.among_zeros(dB)
        if wants_dA:
            dropped = x2 if mask is None else x2 * mask / ctx.keep
            dA = (u.T @ dropped).float()
            dA = dA if part is None or part.dim == 0 else part.among_zeros(dA)
        if wants_dx:
            dx = multiply(g, ctx.layer, backward=True)
            if mask is None:
                dx.addmm_(u, lora_A.to(dy.dtype))
            else:
                dx += (u @ lora_A.to(dy.dtype)) * mask / ctx.keep
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, dA, dB, dc, db, None, None, None


def own_factors(lora_A: Tensor, lora_B: Tensor, part: Part | None) -> tuple[Tensor, Tensor]:
    """What a layer that holds a part of its weight computes with: rows of B or columns of A, the other whole."""
    if part is None:
        return lora_A, lora_B
    return (lora_A, part.of(lora_B)) if part.dim == 0 else (part.of(lora_A), lora_B)


def drop(x: Tensor, dropout: float, part: Part | None) -> tuple[Tensor, Tensor]:
    """(x * m, the bool mask (N, I)); of an input of which a part is here, that part of the mask of all of it."""
    if part is None or part.dim == 0:
        return torch.native_dropout(x, dropout, True)
    _, mask = torch.native_dropout(x.new_empty(part.whole_shape(x.shape)), dropout, True)
    mask = part.of(mask).contiguous()
    return x * mask / (1 - dropout), mask


class LoRAWeights(nn.Module):
    """What one adapter learns in one layer.

    Attributes:
        lora_A (rank, in), lora_B (out, rank): in `dtype`.
        magnitude: (out,) fp32, DoRA; None otherwise.
        lora_E: (rank, 1) fp32, AdaLoRA's singular values; None otherwise.
        scaling: what the update is multiplied by.

    Args:
        init: "kaiming" (A uniform within 1 / sqrt(in), as nn.Linear) or "gaussian" (deviation 1 / rank); B zero.
        generator: CPU generator that A is drawn from.
    """

    magnitude: nn.Parameter | None
    lora_E: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
        device: Any = None,
        scaling: float | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scaling = alpha / rank if scaling is None else scaling
        is_meta = device is not None and torch.device(device).type == "meta"
        # Drawn on the CPU, so that all devices begin alike; on the meta device nothing is.
        start = torch.empty(rank, in_features, device="meta" if is_meta else "cpu")
        if init == "gaussian":
            start.normal_(0.0, 1.0 / rank, generator=generator)
        else:
            bound = 1.0 / math.sqrt(in_features)
            start.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        for parameter in (self.lora_A, self.lora_B):
            parameter.grad_dtype = torch.float32
        self.register_parameter("magnitude", None)
        self.register_parameter("lora_E", None)

    def add_singular_values(self, generator: torch.Generator) -> None:
        """AdaLoRA's start: A and B Gaussian with a deviation of 0.02 (its authors' code), E zero."""
        for parameter in (self.lora_A, self.lora_B):
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
        self.lora_E = nn.Parameter(torch.zeros(self.rank, 1, device=self.lora_A.device))

    @property
    def effective_A(self) -> Tensor:
        """(rank, in) A as it is multiplied: under AdaLoRA with its singular values, in fp32."""
        return self.lora_A if self.lora_E is None else ScaledRows.apply(self.lora_A, self.lora_E)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) update s B A, multiplied in `dtype`; DoRA's rescaling left out."""
        return self.scaling * (self.lora_B.detach().to(dtype) @ self.effective_A.detach().to(dtype))


class LoRALinear(nn.Module):
    """A frozen Linear4bit, Linear or Conv1D with a low-rank update.

    Args:
        base_layer: the layer to wrap; it stays as it is, also after a merge.
        rank, alpha: the update is (alpha / rank) B A; rank 0 wraps without an adapter.
        dropout: probability, on the input of A, in training mode only.
        dtype, init, generator: as in `LoRAWeights`.

    Attributes:
        lora: the active adapter's weights; None = the base alone.
    """

    base_layer: Any
    lora: LoRAWeights | None

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_weight: Tensor | None = None
        self.fixed_scale: Tensor | None = None  # DoRA's c while decoding, when it does not change
        self._squared_norms: Tensor | None = None
        self.out_features, self.in_features = logical_shape(base_layer)
        self.register_module("lora", None)
        if rank > 0:
            shape, device = (self.in_features, self.out_features), base_layer.weight.device
            self.lora = LoRAWeights(*shape, rank, alpha, dropout, dtype, init, generator, device)

    # What callers ask of a layer, they ask of its active adapter.
    @property
    def weights(self) -> LoRAWeights:
        """The active adapter's weights."""
        assert self.lora is not None, "no adapter is active in this layer"
        return self.lora

    @property
    def lora_A(self) -> nn.Parameter:
        return self.weights.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        return self.weights.lora_B

    @property
    def rank(self) -> int:
        return self.weights.rank

    @property
    def alpha(self) -> float:
        return self.weights.alpha

    @property
    def dropout(self) -> float:
        return self.weights.dropout

    @property
    def scaling(self) -> float:
        return self.weights.scaling

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) update s B A, multiplied in `dtype`; DoRA's rescaling left out."""
        return self.weights.delta_weight(dtype)

    @torch.no_grad()
    def weight_norm(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out,) fp32 row norms of W + s B A, without that matrix.

            |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b       for each row w of W, b of B

        |w|^2 is computed once (`activate` forgets it, in case the base has changed); w A^T takes one product of
        rank columns, multiplied in `dtype`.
        """
        if self._squared_norms is None or self._squared_norms.device != self.base_layer.weight.device:
            self._squared_norms = squared_norms(self.base_layer)
        A, B, s = self.weights.effective_A.float(), self.lora_B.float(), self.scaling
        cross = (dequantize_into_scratch(self.base_layer, dtype) @ A.to(dtype).T).float()
        squares = self._squared_norms + (2 * s * cross + s * s * (B @ (A @ A.T))).mul_(B).sum(1)
        return squares.clamp_(min=SMALLEST).sqrt_()  # a row of zeros has c = 0 rather than 0 / 0

    def output_scale(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """(out,) fp32 DoRA's c = magnitude / row norms of W + s B A; None without DoRA."""
        magnitude = self.weights.magnitude
        return None if magnitude is None else magnitude / self.weight_norm(dtype)

    def merge(self) -> None:
        """Compute with one dense weight c (W + s B A), added in fp32; the base layer is left untouched."""
        if self.merged_weight is None and self.lora is not None:
            weight = self.base_layer.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            merged = dense_weight(self.base_layer, torch.float32) + self.delta_weight()
            self.merged_weight = with_magnitude(merged, self.weights.magnitude).to(dtype)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit: the base layer was never changed."""
        self.merged_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("The adapter is merged into its base, so it cannot train; call unmerge first.")
            return F.linear(x, self.merged_weight.to(x.dtype), layer_bias(self.base_layer, x.dtype))
        weights = self.lora
        if weights is None:
            return self.base_layer(x)
        dropout = weights.dropout if self.training else 0.0
        A, B, s, bias = weights.effective_A, weights.lora_B, weights.scaling, self.base_layer.bias
        scale = self.output_scale(x.dtype) if self.fixed_scale is None else self.fixed_scale
        if not torch.is_grad_enabled() and dropout == 0:
            x2 = x.reshape(-1, x.shape[-1])
            own_A, own_B = (f.to(x.dtype) for f in own_factors(A, B, part_of(self.base_layer)))
            y = self.base_layer(x2).addmm_(x2 @ own_A.T, own_B.T, alpha=s)
            if scale is not None:
                y = rescale(y if bias is None else y - bias.to(x.dtype), y, scale)
            return y.view(*x.shape[:-1], y.shape[-1])
        if self.base_layer.weight.requires_grad:  # a 16-bit base that was unfrozen
            if scale is not None:
                raise InputError("DoRA wants a frozen base; train without use_dora, or call freeze_base.")
            return self.base_layer(x) + s * F.linear(F.linear(F.dropout(x, dropout), A.to(x.dtype)), B.to(x.dtype))
        return LoRAFunction.apply(x, A, B, scale, bias, self.base_layer, s, dropout)

    def extra_repr(self) -> str:
        if self.lora is None:
            return "no active adapter"
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, dtype={self.lora_A.dtype}"
