"""Which layers get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qlora.model.base import find_base_info
from qlora.system.errors import InputError


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> layer that LoRA can wrap: Linear (4-bit too) and Conv1D, the output head among them.

    A wrapped layer appears under its own name, as the layer inside.
    """
    from transformers.pytorch_utils import Conv1D

    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def head_name(model: nn.Module) -> str | None:
    """Qualified name of the output head; None: the model has none."""
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return next((name for name, module in model.named_modules() if module is head), None)


def match_targets(
    model: nn.Module, targets: Iterable[str], numbers: Iterable[int] | None = None
) -> dict[str, Any]:
    """The layers that `targets` name: a layer's last name(s), its full name, or "all-linear".

    "all-linear" leaves out the output head, as in PEFT; its name adapts it.

    Args:
        numbers: only these decoder layers, counted from 0; None = all.
    Raises:
        InputError: a target matches nothing (lists the names there are), a decoder layer does not exist, or the
            head is named on a base that processes split.
    """
    layers, head = linear_layers(model), head_name(model)
    targets = list(targets)
    if targets == ["all-linear"]:
        layers = {name: layer for name, layer in layers.items() if name != head}
    else:
        unmatched = [t for t in targets if not any(_named(name, t) for name in layers)]
        if unmatched or not targets:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
            raise InputError(
                f"target_modules {unmatched} match no linear layer. This model has: {available}. "
                "Pass --target-modules with names from that list, or all-linear."
            )
        layers = {name: layer for name, layer in layers.items() if any(_named(name, t) for t in targets)}
    info = find_base_info(model)
    if head in layers and info is not None and info.ranks is not None:
        raise InputError(f"{head} cannot be adapted on a base that processes split; leave out one of the two.")
    if numbers is None:
        return layers
    present = {number for number in map(layer_number, layers) if number is not None}
    absent = sorted(set(numbers) - present)
    if absent:
        raise InputError(
            f"layers names decoder layer {absent[0]}, where this model has none to adapt; its layers are "
            f"{min(present, default=0)} to {max(present, default=0)}."
        )
    outside = [t for t in targets if all(layer_number(name) is None for name in layers if _named(name, t))]
    if outside and targets != ["all-linear"]:
        raise InputError(
            f"target_modules {outside} are outside of the decoder layers, so layers leaves them out; drop one of "
            "the two settings."
        )
    wanted = set(numbers)
    return {name: layer for name, layer in layers.items() if layer_number(name) in wanted}


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def layer_number(name: str) -> int | None:
    """The decoder layer that a layer is in, counted from 0: the first number in its name; None: in none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None
