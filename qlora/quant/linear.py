"""Which layers are linear, and which of them may be computed without being called.

A *plain* layer has one of the types that `plain_type` has registered, and no hooks: its output is x W^T + b of its
own weight and bias, so that LoRA may compute that in its own way. Any other linear layer (a subclass of
nn.Linear, a type from `register_linear`, a layer with hooks, weight_norm, a parametrization or a replaced
`forward`) is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import nn

from qlora.quant.parts import Part
from qlora.system.errors import InputError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_plain: set[type] = {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear}  # the latter adds nothing
Layer = TypeVar("Layer", bound=type)


@dataclass(frozen=True)
class LinearShape:
    """What LoRA has to know of a linear layer that is not an nn.Linear.

    Attributes:
        out_features, in_features: of the whole layer, however many processes hold it.
        part: the rows (dim 0) or columns (dim 1) of the weight that this process holds; None = all.
        group: process group of the processes that hold the parts; None = all processes.
    """

    out_features: int
    in_features: int
    part: Part | None = None
    group: Any = None


Describe = Callable[[Any], LinearShape]
_registered: dict[type, Describe] = {}


def register_linear(kind: type, adapter: Describe) -> None:
    """Let LoRA adapt layers of a type that is not an nn.Linear, such as column- and row-parallel ones.

    The layer is called as it is; the low-rank update is added to its output, or to the first item of the tuple it
    returns. Its parameter `weight` (out, in), or a part of that, is only read and replaced by a merge. Subclasses
    count too.

    Args:
        adapter: describes a layer of this type.
    Raises:
        InputError: `kind` is not a class of modules.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"register_linear got {kind!r:.80}; give it a class of torch modules.")
    _registered[kind] = adapter


def registered_shape(layer: nn.Module) -> LinearShape | None:
    """The description of a layer whose type is registered; else None."""
    describe = next((_registered[kind] for kind in type(layer).__mro__ if kind in _registered), None)
    return None if describe is None else describe(layer)


def plain_type(kind: Layer) -> Layer:
    """Register a type whose forward is x W^T + b; usable as a decorator."""
    _plain.add(kind)
    return kind


@cache
def conv1d() -> type[nn.Module]:
    """transformers' Conv1D: GPT-2's layer, with its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return plain_type(Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt this module."""
    return isinstance(module, (nn.Linear, conv1d())) or registered_shape(module) is not None


def is_plain(layer: nn.Module) -> bool:
    """Whether calling this layer computes x W^T + b and does nothing else."""
    own = layer.__dict__
    return type(layer) in _plain and not any(own[hooks] for hooks in HOOKS) and "forward" not in own


def explain_not_plain(layer: nn.Module) -> str:
    """Why a layer is not plain, as part of a sentence."""
    kind = type(layer).__name__
    if type(layer) not in _plain:
        return f"is a {kind}, which may compute more than its weight says"
    return f"is a {kind} with hooks or a forward of its own"
