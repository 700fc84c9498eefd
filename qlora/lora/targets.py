"""Which layers get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qlora.quant.linear import is_linear
from qlora.system.errors import InputError


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> layer that LoRA can wrap, except the output head: `is_linear`.

    A wrapped layer appears under its own name, as the layer inside.
    """
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    }


def match_targets(
    model: nn.Module, targets: Iterable[str], numbers: Iterable[int] | None = None
) -> dict[str, Any]:
    """The layers that `targets` name: a layer's last name(s), its full name, or "all-linear".

    Args:
        numbers: only these decoder layers, counted from 0; None = all.
    Raises:
        InputError: a target matches nothing (lists the names there are), or a decoder layer does not exist.
    """
    layers = linear_layers(model)
    targets = list(targets)
    if targets != ["all-linear"]:
        unmatched = [t for t in targets if not any(_named(name, t) for name in layers)]
        if unmatched or not targets:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
            raise InputError(
                f"target_modules {unmatched} match no linear layer. This model has: {available}. "
                "Pass --target-modules with names from that list, or all-linear."
            )
        layers = {name: layer for name, layer in layers.items() if any(_named(name, t) for t in targets)}
    if numbers is None:
        return layers
    present = {number for number in map(layer_number, layers) if number is not None}
    absent = sorted(set(numbers) - present)
    if absent:
        raise InputError(
            f"layers names decoder layer {absent[0]}, where this model has none to adapt; its layers are "
            f"{min(present, default=0)} to {max(present, default=0)}."
        )
    wanted = set(numbers)
    return {name: layer for name, layer in layers.items() if layer_number(name) in wanted}


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def layer_number(name: str) -> int | None:
    """The decoder layer that a layer is in, counted from 0: the first number in its name; None: in none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None
