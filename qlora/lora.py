"""LoRA on frozen linear layers (arXiv 2106.09685), forward and backward in one function.

Shapes: N tokens, I inputs, O outputs, R rank; x (N, I), W (O, I) frozen and possibly 4-bit, A (R, I),
B (O, R), s = alpha / R, m the dropout mask divided by its keep probability (absent: all ones), * elementwise.

    forward    h = (x * m) A^T                  (N, R)
               y = x W^T + b + s h B^T          (N, O)

    backward   u  = s dy B                      (N, R)
               dB = s dy^T h                    (O, R)
               dA = u^T (x * m)                 (R, I)
               dx = dy W + (u A) * m            (N, I)

What is kept between the two: x (shared by every layer that reads it: q, k and v keep one copy), h and the
one-byte mask. W is dequantized twice and kept never; W and b get no gradient; dx is computed only if
something below wants it, so the first adapted layer stops the backward pass. A and B are bf16 but their
gradients leave in fp32 (`grad_dtype`), so that accumulating micro-batches loses nothing.

B starts at zero: the adapted model is the base model until the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.quantize import dense_weight, layer_bias, logical_numel, logical_shape


class LoRAFunction(torch.autograd.Function):
    """Base and adapter together; formulas in the module docstring."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, layer: nn.Module, scaling: float, dropout: float
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask = None
        dropped = x2
        if dropout > 0:
            dropped, mask = torch.native_dropout(x2, dropout, True)
        h = dropped @ A.T
        y = F.linear(x2, dense_weight(layer, x.dtype), layer_bias(layer, x.dtype))
        y.addmm_(h, B.T, alpha=scaling)
        ctx.save_for_backward(x2, h, mask, lora_A, lora_B)
        ctx.layer, ctx.scaling, ctx.keep = layer, scaling, 1 - dropout
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x2, h, mask, lora_A, lora_B = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        wants_dx, wants_dA, wants_dB = ctx.needs_input_grad[:3]
        u = ctx.scaling * (dy2 @ lora_B.to(dy.dtype))
        dx = dA = dB = None
        if wants_dB:
            dB = (dy2.T @ h).float() * ctx.scaling
        if wants_dA:
            dropped = x2 if mask is None else x2 * mask / ctx.keep
            dA = (u.T @ dropped).float()
        if wants_dx:
            dx = dy2 @ dense_weight(ctx.layer, dy.dtype)
            if mask is None:
                dx.addmm_(u, lora_A.to(dy.dtype))
            else:
                dx += (u @ lora_A.to(dy.dtype)) * mask / ctx.keep
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, dA, dB, None, None, None


class LoRALinear(nn.Module):
    """A frozen Linear4bit, Linear or Conv1D with a low-rank update.

    Args:
        base_layer: the layer to wrap; it stays as it is, also after a merge.
        rank, alpha: the update is (alpha / rank) B A.
        dropout: probability, on the input of A, in training mode only.
        dtype: of lora_A (rank, in) and lora_B (out, rank).
        init: "kaiming" (uniform within 1 / sqrt(in), as nn.Linear) or "gaussian" (deviation 1 / rank) for A.
        generator: CPU generator that A is drawn from.
    """

    base_layer: Any

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
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.merged_weight: Tensor | None = None
        self.out_features, self.in_features = logical_shape(base_layer)
        start = torch.empty(rank, self.in_features)
        if init == "gaussian":
            start.normal_(0.0, 1.0 / rank, generator=generator)
        else:
            bound = 1.0 / math.sqrt(self.in_features)
            start.uniform_(-bound, bound, generator=generator)
        device: Any = base_layer.weight.device
        self.lora_A = nn.Parameter(start.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))
        for parameter in (self.lora_A, self.lora_B):
            parameter.grad_dtype = torch.float32

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) update (alpha / rank) B A, multiplied in `dtype`."""
        return self.scaling * (self.lora_B.detach().to(dtype) @ self.lora_A.detach().to(dtype))

    def merge(self) -> None:
        """Compute with one dense weight W + s B A, added in fp32; the base layer is left untouched."""
        if self.merged_weight is None:
            weight = self.base_layer.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            merged = dense_weight(self.base_layer, torch.float32) + self.delta_weight()
            self.merged_weight = merged.to(dtype)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit: the base layer was never changed."""
        self.merged_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("The adapter is merged into its base, so it cannot train; call unmerge first.")
            return F.linear(x, self.merged_weight.to(x.dtype), layer_bias(self.base_layer, x.dtype))
        dropout = self.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and dropout == 0:
            x2 = x.reshape(-1, x.shape[-1])
            y = self.base_layer(x2)
            y.addmm_(x2 @ self.lora_A.to(x.dtype).T, self.lora_B.to(x.dtype).T, alpha=self.scaling)
            return y.view(*x.shape[:-1], y.shape[-1])
        if any(p.requires_grad for p in self.base_layer.parameters()):
            h = F.linear(F.dropout(x, dropout), self.lora_A.to(x.dtype))
            return self.base_layer(x) + self.scaling * F.linear(h, self.lora_B.to(x.dtype))
        return LoRAFunction.apply(x, self.lora_A, self.lora_B, self.base_layer, self.scaling, dropout)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, dtype={self.lora_A.dtype}"


# ---- choosing and replacing layers ------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> layer that LoRA can wrap: Linear (4-bit too) and Conv1D, the output head left out."""
    from transformers.pytorch_utils import Conv1D

    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def match_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """The layers that `targets` name: a layer's last name(s), its full name, or "all-linear".

    Raises:
        InputError: a target that matches nothing, with the names there are.
    """
    layers = linear_layers(model)
    targets = list(targets)
    if targets == ["all-linear"]:
        return layers
    unmatched = [t for t in targets if not any(_named(name, t) for name in layers)]
    if unmatched or not targets:
        available = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
        raise InputError(
            f"target_modules {unmatched} match no linear layer. This model has: {available}. "
            "Pass --target-modules with names from that list, or all-linear."
        )
    return {name: layer for name, layer in layers.items() if any(_named(name, t) for t in targets)}


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def inject_lora(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Replace the target layers of `model` by LoRALinear, in place; what trains is left to `freeze_base`.

    Args:
        seed: of A's start. The same seed gives the same adapter on every machine and rank.
    Returns:
        The qualified names of the wrapped layers, in model order.
    Raises:
        InputError: targets that match nothing, or a model that has adapters already.
    """
    if lora_layers(model):
        raise InputError("The model has LoRA layers already; inject into a fresh base model.")
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if config.adapter_dtype == "bfloat16" else torch.float32
    chosen = match_targets(model, config.targets)
    for name, layer in chosen.items():
        parent, _, child = name.rpartition(".")
        wrapped = LoRALinear(layer, config.rank, config.alpha, config.dropout, dtype, config.init, generator)
        setattr(model.get_submodule(parent), child, wrapped.train(layer.training))
    return list(chosen)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Qualified name -> LoRALinear, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---- what trains ------------------------------------------------------------------------------------------


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted layer, in model order."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is not an adapter's; tied ones once."""
    adapter = {id(p) for p in lora_parameters(model)}
    return [p for p in model.parameters() if id(p) not in adapter]


def freeze_base(model: nn.Module) -> None:
    """Train the adapters alone."""
    for parameter in base_parameters(model):
        parameter.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Train everything that can take a gradient; packed 4-bit weights are integers and cannot."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


# ---- merging in memory ------------------------------------------------------------------------------------


def merge_lora(model: nn.Module) -> None:
    """Let every adapted layer compute with one merged dense weight (merge.py writes one to disk)."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Return to base + adapter, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


# ---- state ------------------------------------------------------------------------------------------------


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank), detached, not copied."""
    return {
        f"{name}.{part}.weight": getattr(layer, part).detach()
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor], origin: str = "state dict") -> None:
    """Copy `state` into the model's adapters; nothing changes unless everything fits.

    Raises:
        InputError: lists every missing or unexpected key, wrong shape and non-finite tensor at once.
    """
    own = lora_state_dict(model)
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)} but the model wants {tuple(own[key].shape)}")
        elif not torch.isfinite(state[key]).all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        raise InputError(f"The adapter in {origin} does not fit this model: {'; '.join(sorted(problems))}.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


# ---- counting ---------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    """All weights, tied ones once, packed 4-bit ones by what they stand for."""
    return sum(logical_numel(p) for p in model.parameters())


def count_trainable_parameters(model: nn.Module) -> int:
    """Weights with a gradient."""
    return sum(logical_numel(p) for p in model.parameters() if p.requires_grad)


@dataclass
class ParameterSummary:
    """Logical counts; `str()` is the line a run prints."""

    total: int
    trainable: int
    adapted_layers: int

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} trainable of {self.total:,} parameters ({self.share:.4%}), "
            f"{self.adapted_layers} adapted layers"
        )


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Counts of all and of trainable parameters, and the number of adapted layers."""
    return ParameterSummary(count_parameters(model), count_trainable_parameters(model), len(lora_layers(model)))
