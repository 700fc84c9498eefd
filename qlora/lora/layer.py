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

The variants differ in s, c, A and the initial A and B. The rest of a variant is in its own class
(`LoRAWeights.variant`, lora/variant.py), which the layer calls once:

    LoRA       s = alpha / R
    rsLoRA     s = alpha / sqrt(R)                              arXiv 2312.03732
    DoRA       c = magnitude / n, n = row norms of W + s B A    arXiv 2402.09353; see lora/dora.py
    AdaLoRA    (E * A) in place of A, E (R, 1)              arXiv 2303.10512; see lora/adalora.py
    PiSSA, LoftQ                                                initial A and B; see lora/svd_start.py

c is applied as z + (c - 1) z, which keeps c's digits in bf16. Dropout is on the input of A alone.

Kept between the two passes: x (shared by every layer that reads it: q, k and v keep one copy), h, the one-byte
mask, and z under DoRA. W is dequantized twice (a third time under DoRA, for n), never kept, and gets no gradient.
dx is computed only if a layer below needs it, so the first adapted layer stops the backward pass. A and B are
bf16, but their gradients are returned in fp32 (`grad_dtype`), so that accumulating micro-batches loses nothing.

Under tensor parallelism (parallel/tensor_parallel.py) a process holds part of W but all of A and B. It uses its
rows of B or its columns of A and of the dropout mask, which is that of the unsplit layer. Gradients are returned
whole, with zeros for the other processes' parts. If columns are split, y and h are partial sums.

Until the first step the adapted model equals the base model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.quant.layers import dense_weight, layer_bias, logical_shape, multiply
from qlora.quant.parts import Part, part_of
from qlora.system.errors import InputError

if TYPE_CHECKING:
    from qlora.lora.variant import Variant


class LoRAFunction(torch.autograd.Function):
    """Base and adapter in one function; formulas in the module docstring.

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


def rescale(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """y + (scale - 1) z in y's dtype, y * scale if z is y: near 1 a scale in bf16 has steps of 1/128."""
    return torch.addcmul(y, z, (scale - 1).to(y.dtype))


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


def draw_A(rank: int, in_features: int, init: str, generator: torch.Generator | None, device: Any) -> Tensor:
    """Initial A (rank, in) fp32, drawn on the CPU so that all devices start the same; empty on the meta device.

    Args:
        init: "gaussian" (standard deviation 1 / rank), else uniform within 1 / sqrt(in), as nn.Linear.
        generator: CPU generator to draw from.
    """
    is_meta = device is not None and torch.device(device).type == "meta"
    start = torch.empty(rank, in_features, device="meta" if is_meta else "cpu")
    if init == "gaussian":
        return start.normal_(0.0, 1.0 / rank, generator=generator)
    bound = 1.0 / math.sqrt(in_features)
    return start.uniform_(-bound, bound, generator=generator)


class LoRAWeights(nn.Module):
    """What one adapter learns in one layer.

    Attributes:
        lora_A (rank, in), lora_B (out, rank): in `dtype`.
        scaling: multiplies the update.
        variant: its parameters are attributes too, named as in its `extras`; None = plain LoRA.

    Args:
        A: (rank, in) initial values; B starts at zero.
        scaling: None = alpha / rank.
    """

    variant: Variant | None

    def __init__(
        self,
        A: Tensor,
        out_features: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
        scaling: float | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = len(A), alpha, dropout
        self.scaling = alpha / self.rank if scaling is None else scaling
        self.lora_A = nn.Parameter(A.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, self.rank, device=device, dtype=dtype))
        for parameter in (self.lora_A, self.lora_B):
            parameter.grad_dtype = torch.float32
        self.variant = None

    @property
    def extras(self) -> dict[str, nn.Parameter]:
        """The variant's parameters besides A and B, by saved names."""
        names = {} if self.variant is None else self.variant.extras
        return {saved: self.get_parameter(name) for saved, name in names.items()}

    @property
    def effective_A(self) -> Tensor:
        """(rank, in) A as used in products."""
        return self.lora_A if self.variant is None else self.variant.effective_A(self.lora_A, self.extras)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) update s B A, multiplied in `dtype`, without DoRA's rescaling."""
        return self.scaling * (self.lora_B.detach().to(dtype) @ self.effective_A.detach().to(dtype))


class LoRALinear(nn.Module):
    """A frozen Linear4bit, Linear or Conv1D with a low-rank update.

    Args:
        base_layer: the layer to wrap; never changed, not even by a merge.
        rank, alpha: the update is (alpha / rank) B A; rank 0 wraps without an adapter.
        dropout: probability, on the input of A, in training mode only.
        dtype: of A and B.
        init, generator: as for `draw_A`.

    Attributes:
        lora: the active adapter's weights; None = the base alone.
        fixed_scale: c while decoding, when it does not change.
        kept_of_base: (out,) the variant's cached values from the base's weight, valid until it changes.
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
        self.fixed_scale: Tensor | None = None
        self.kept_of_base: Tensor | None = None
        self.out_features, self.in_features = logical_shape(base_layer)
        self.register_module("lora", None)
        if rank > 0:
            device = base_layer.weight.device
            A = draw_A(rank, self.in_features, init, generator, device)  # type: ignore[arg-type]
            self.lora = LoRAWeights(A, self.out_features, alpha, dropout, dtype, device)

    @property
    def weights(self) -> LoRAWeights:
        """The active adapter's weights."""
        assert self.lora is not None, "no adapter is active in this layer"
        return self.lora

    def output_scale(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """(out,) fp32 current c; None = ones."""
        variant = self.weights.variant
        return None if variant is None else variant.output_scale(self, dtype)

    def merge(self) -> None:
        """Compute with one dense weight c (W + s B A), added in fp32; the base layer is unchanged."""
        if self.merged_weight is None and self.lora is not None:
            weight, variant = self.base_layer.weight, self.lora.variant
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            merged = dense_weight(self.base_layer, torch.float32) + self.lora.delta_weight()
            merged = merged if variant is None else variant.merge(merged, self.lora.extras)
            self.merged_weight = merged.to(dtype)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.merged_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        if self.merged_weight is not None:
            return self._compute_merged(x, self.merged_weight)
        if self.lora is None:
            return self.base_layer(x)
        weights, variant = self.lora, self.lora.variant
        A, scale = (weights.lora_A, None) if variant is None else variant.terms(self, x.dtype)
        dropout = weights.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and dropout == 0:
            return self._answer(x, A, scale)
        if self.base_layer.weight.requires_grad:
            return self._train_with_base(x, A, scale, dropout)
        settings = self.base_layer, weights.scaling, dropout
        return LoRAFunction.apply(x, A, weights.lora_B, scale, self.base_layer.bias, *settings)

    def _compute_merged(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("The adapter is merged into its base, so it cannot train; call unmerge first.")
        return F.linear(x, weight.to(x.dtype), layer_bias(self.base_layer, x.dtype))

    def _answer(self, x: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
        """Compute without gradients and dropout, with the base layer's decoding function."""
        weights, bias, x2 = self.weights, self.base_layer.bias, x.reshape(-1, x.shape[-1])
        own_A, own_B = (f.to(x.dtype) for f in own_factors(A, weights.lora_B, part_of(self.base_layer)))
        y = self.base_layer(x2).addmm_(x2 @ own_A.T, own_B.T, alpha=weights.scaling)
        if scale is not None:
            y = rescale(y if bias is None else y - bias.to(x.dtype), y, scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _train_with_base(self, x: Tensor, A: Tensor, scale: Tensor | None, dropout: float) -> Tensor:
        """Forward pass over an unfrozen 16-bit base."""
        weights = self.weights
        if scale is not None:
            variant = weights.variant
            assert variant is not None
            raise InputError(
                f"{variant.name} needs a frozen base; train without {variant.flag}, or call freeze_base."
            )
        h = F.linear(F.dropout(x, dropout), A.to(x.dtype))
        return self.base_layer(x) + weights.scaling * F.linear(h, weights.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        if self.lora is None:
            return "no active adapter"
        w = self.lora
        return f"rank={w.rank}, alpha={w.alpha}, dropout={w.dropout}, dtype={w.lora_A.dtype}"
