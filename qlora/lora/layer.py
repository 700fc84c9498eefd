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
dx is computed only if a layer below needs it, so the first adapted layer stops the backward pass. Gradients of
A and B are returned in fp32. autograd casts them to the parameter's dtype, or keeps them where the optimizer takes
them so (lora/optimizer.py).

Under tensor parallelism (parallel/tensor_parallel.py) a process holds part of W but all of A and B. It uses its
rows of B or its columns of A and of the dropout mask, which is that of the unsplit layer. Gradients are returned
whole, with zeros for the other processes' parts. If columns are split, y and h are partial sums.

A base layer that is more than its weight (a subclass of nn.Linear, a layer with hooks, a type from
`register_linear`; see quant/linear.py) is called as it is, and the update added: lora/composed.py.

Under autocast, x is cast to autocast's dtype, and the layer computes in that, as nn.Linear does.

Until the first step the adapted model equals the base model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.config.lora import LoRAConfig
from qlora.lora.composed import drop, own_factors, update, update_of_own_part
from qlora.quant.layers import (
    autocast_dtype,
    dense_weight,
    frozen_linear,
    is_out_in,
    keep_unpacked,
    layer_bias,
    logical_shape,
    multiply,
)
from qlora.quant.linear import explain_not_plain, is_linear, is_plain, registered_shape
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


def draw_A(
    rank: int,
    in_features: int,
    init: str,
    generator: torch.Generator | None,
    device: Any,
    spread: float | None = None,
) -> Tensor:
    """Initial A (rank, in) fp32, drawn on the CPU so that all devices start the same; empty on the meta device.

    Args:
        init: "gaussian", else uniform.
        generator: CPU generator to draw from.
        spread: the Gaussian's standard deviation (None = 1 / rank), or a in the bound sqrt(6 / ((1 + a^2) in))
            (None = sqrt(5), which makes it 1 / sqrt(in), as in nn.Linear).
    """
    is_meta = device is not None and torch.device(device).type == "meta"
    start = torch.empty(rank, in_features, device="meta" if is_meta else "cpu")
    if init == "gaussian":
        return start.normal_(0.0, 1.0 / rank if spread is None else spread, generator=generator)
    bound = (1.0 if spread is None else math.sqrt(6 / (1 + spread**2))) / math.sqrt(in_features)
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
    """A linear layer (Linear4bit, Linear, Conv1D, or of a registered type) with a low-rank update.

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
        if not is_linear(base_layer):
            raise InputError(f"LoRA adapts linear layers, not {type(base_layer).__name__}; see register_linear.")
        if rank != 0:  # their types and ranges
            LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, init=init)  # type: ignore[arg-type]
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype is {dtype!r:.80}; give a torch.dtype.")
        keep_unpacked(base_layer)
        self.base_layer = base_layer
        self.merged_weight: Tensor | None = None
        self.fixed_scale: Tensor | None = None
        self.kept_of_base: Tensor | None = None
        self.out_features, self.in_features = logical_shape(base_layer)
        self.register_module("lora", None)
        if rank > 0:
            device = next(base_layer.parameters()).device
            A = draw_A(rank, self.in_features, init, generator, device)
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

    @property
    def weight(self) -> Tensor:
        """c (W + s B A) in the base weight's dtype and orientation, for code that reads a layer's weight.

        nn.MultiheadAttention reads its out_proj so, and nn.TransformerEncoderLayer both layers when it evaluates.
        Gradients reach A and B through it; dropout is left out. Without an adapter it is the base's weight.

        Raises:
            InputError: the base layer's weight does not have its shape, and so cannot be added to.
        """
        if self.lora is None:
            return self.base_layer.weight
        if self.merged_weight is not None:
            return self.merged_weight if is_out_in(self.base_layer) else self.merged_weight.T
        weight = self.base_layer.weight
        if weight.requires_grad:
            dense = (weight if is_out_in(self.base_layer) else weight.T).float()
        else:
            dense = dense_weight(self.base_layer, torch.float32)
        own_A, own_B = own_factors(self.lora.effective_A, self.lora.lora_B, self._part)
        if dense.shape != (len(own_B), own_A.shape[1]):
            raise InputError(f"The weight of a layer that {explain_not_plain(self.base_layer)} cannot be read.")
        whole = dense + self.lora.scaling * (own_B.float() @ own_A.float())
        scale = self.output_scale()
        whole = whole if scale is None else whole * scale[:, None]
        dtype = weight.dtype if weight.is_floating_point() else weight.quant_state.dtype
        return (whole if is_out_in(self.base_layer) else whole.T).to(dtype)

    @property
    def bias(self) -> Tensor | None:
        """(out,) the base layer's bias."""
        return self.base_layer.bias

    @property
    def _part(self) -> Part | None:
        shape = registered_shape(self.base_layer)
        return part_of(self.base_layer) if shape is None else shape.part

    def merged(self) -> Tensor:
        """(out, in) fp32 c (W + s B A) of the active adapter; a part of it, if the layer holds a part."""
        own_A, own_B = own_factors(self.weights.effective_A.detach(), self.weights.lora_B.detach(), self._part)
        weight = dense_weight(self.base_layer, torch.float32)
        merged = weight + self.weights.scaling * (own_B.float() @ own_A.float())
        variant = self.weights.variant
        return merged if variant is None else variant.merge(merged, self.weights.extras)

    def merge(self) -> None:
        """Compute with one dense weight c (W + s B A), added in fp32; the base layer is unchanged.

        Raises:
            InputError: the base layer is not plain.
        """
        if self.merged_weight is None and self.lora is not None:
            self._check_plain("merged")
            weight = self.base_layer.weight
            self.merged_weight = self.merged().to(weight.dtype if weight.is_floating_point() else torch.float32)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.merged_weight = None

    def _check_plain(self, what: str) -> None:
        if not is_plain(self.base_layer):
            raise InputError(f"An adapted layer {explain_not_plain(self.base_layer)}, so it cannot be {what}.")

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """(..., in) -> (..., out), in x's dtype, or autocast's.

        Args:
            args, options: passed to a base layer of another type than nn.Linear, whose output may be a tuple.
        """
        if self.merged_weight is not None:
            return self._compute_merged(x, self.merged_weight)
        if self.lora is None:
            return self.base_layer(x, *args, **options)
        base = self.base_layer
        if args or options or not is_plain(base) or base.weight.requires_grad:
            return self._compose(x, *args, **options)
        dtype = autocast_dtype(x)
        if dtype is None:
            return self._fuse(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._fuse(x.to(dtype))

    def _fuse(self, x: Tensor) -> Tensor:
        """Base and adapter of a plain, frozen layer together."""
        weights, variant = self.weights, self.weights.variant
        A, scale = (weights.lora_A, None) if variant is None else variant.terms(self, x.dtype)
        dropout = weights.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and dropout == 0:
            return self._answer(x, A, scale)
        settings = self.base_layer, weights.scaling, dropout
        return LoRAFunction.apply(x, A, weights.lora_B, scale, self.base_layer.bias, *settings)

    def _compute_merged(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "The adapter is merged into its base, so it cannot train; call unmerge first, or eval()."
            )
        self._check_plain("merged; call unmerge")
        return F.linear(x, weight.to(x.dtype), layer_bias(self.base_layer, x.dtype))

    def _answer(self, x: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
        """Compute without gradients and dropout, with the base layer's decoding function."""
        weights, base, bias, x2 = self.weights, self.base_layer, self.base_layer.bias, x.reshape(-1, x.shape[-1])
        own_A, own_B = (f.to(x.dtype) for f in own_factors(A, weights.lora_B, part_of(base)))
        casts = base.weight.is_floating_point() and base.weight.dtype != x.dtype and not hasattr(base, "decode")
        y = (frozen_linear(x2, base) if casts else base(x2)).addmm_(x2 @ own_A.T, own_B.T, alpha=weights.scaling)
        if scale is not None:
            y = rescale(y if bias is None else y - bias.to(x.dtype), y, scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _compose(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """The base layer as it is, plus the update."""
        weights, variant, base = self.weights, self.weights.variant, self.base_layer
        if variant is not None and variant.needs_weight:
            why = "is not frozen; call freeze_base" if is_plain(base) else explain_not_plain(base)
            raise InputError(
                f"{variant.name} needs a frozen, plain base layer, but one {why}; train without {variant.flag}."
            )
        result = base(x, *args, **options)
        y = result[0] if isinstance(result, tuple) else result
        factors, shape = (weights.effective_A, weights.lora_B), registered_shape(base)
        dropout = weights.dropout if self.training else 0.0
        if shape is None:
            change = update_of_own_part(x, *factors, weights.scaling, dropout, part_of(base))
        else:
            change = update(x, y, *factors, weights.scaling, dropout, shape)
        y = y + change.to(y.dtype)
        return (y, *result[1:]) if isinstance(result, tuple) else y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # type: ignore[override]
        """Also take an unwrapped layer's keys, as in a checkpoint of the base: `<name>.weight` is the base's."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            own = key[len(prefix) :]
            if own.partition(".")[0] not in ("base_layer", "lora"):
                state_dict.setdefault(f"{prefix}base_layer.{own}", state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.kept_of_base = None
        if self.merged_weight is not None and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            args[-1].append(f"{prefix[:-1]} is merged; call unmerge before loading its base.")

    def extra_repr(self) -> str:
        if self.lora is None:
            return "no active adapter"
        w = self.lora
        return f"rank={w.rank}, alpha={w.alpha}, dropout={w.dropout}, dtype={w.lora_A.dtype}"
