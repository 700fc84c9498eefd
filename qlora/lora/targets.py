"""Which layers get an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from qlora.config.fields import layer_number, names_layer
from qlora.config.lora import DEFAULT_TARGETS
from qlora.lora.layer import LoRALinear
from qlora.model.base import find_base_info
from qlora.quant.linear import is_linear
from qlora.system.errors import InputError

# How architectures call what computes queries and values, if not q_proj and v_proj.
ATTENTION_INPUTS = (
    ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("query", "value"), ("q_lin", "v_lin"),
    ("q", "v"),
)  # fmt: skip


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> layer that LoRA can wrap (`is_linear`), the output head among them.

    A wrapped layer appears under its own name, as the layer inside.
    """
    layers = dict[int, tuple[str, nn.Module]]()
    for name, module in _places(model):
        if is_linear(module):
            layers.setdefault(id(module), (name, module))
    return dict(layers.values())


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its qualified names: a shared one has several."""
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, LoRALinear)}
    for name, module in model.named_modules(remove_duplicate=False):
        yield (name.removesuffix(".base_layer") if id(module) in inside else name), module


def head_name(model: nn.Module) -> str | None:
    """Qualified name of the output head; None: the model has none."""
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return next((name for name, module in model.named_modules() if module is head), None)


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """`targets`, or what stands for the default ones in a model that has neither of them."""
    ends = {name.rpartition(".")[2] for name in linear_layers(model)}
    if tuple(targets) != DEFAULT_TARGETS or ends & {*DEFAULT_TARGETS}:
        return list(targets)
    return next((list(names) for names in ATTENTION_INPUTS if ends.issuperset(names)), list(targets))


def match_targets(
    model: nn.Module, targets: Sequence[str], numbers: Iterable[int] | None = None, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """The layers that `targets` name: a layer's last name(s), its full name, a pattern, or "all-linear".

    The default targets stand for the attention's input layers: `resolve_targets`.

    "all-linear" leaves out the output head, as in PEFT; its name adapts it.

    Args:
        exclude: names and patterns of layers to leave out.
        numbers: only these decoder layers, counted from 0; None = all.
    Raises:
        InputError: a target matches nothing (lists the names there are), a decoder layer does not exist, or the
            head is named on a base that processes split.
    """
    layers, head = linear_layers(model), head_name(model)
    targets = resolve_targets(model, targets)
    names = dict[int, list[str]]()
    for place, module in _places(model):
        names.setdefault(id(module), []).append(place)

    def is_named(name: str, target: str) -> bool:
        return any(names_layer(place, target) for place in names[id(layers[name])])

    if targets == ["all-linear"]:
        layers = {name: layer for name, layer in layers.items() if name != head}
    else:
        unmatched = [t for t in targets if not any(is_named(name, t) for name in layers)]
        if unmatched or not targets:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
            raise InputError(
                f"target_modules {unmatched} match no linear layer. This model has: {available}. "
                "Pass --target-modules with names from that list, or all-linear."
            )
        layers = {name: layer for name, layer in layers.items() if any(is_named(name, t) for t in targets)}
    unknown = [t for t in exclude if not any(is_named(name, t) for name in layers)]
    if unknown:
        raise InputError(f"exclude_modules {unknown} name none of the layers to adapt; correct or drop them.")
    layers = {name: layer for name, layer in layers.items() if not any(is_named(name, t) for t in exclude)}
    if not layers:
        raise InputError("exclude_modules leaves no layer to adapt; name fewer.")
    info = find_base_info(model) if head in layers else None
    if info is not None and info.ranks is not None:
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
    numbers_of = {t: {layer_number(name) for name in layers if names_layer(name, t)} for t in targets}
    outside = [t for t, found in numbers_of.items() if found == {None}]
    if outside and targets != ["all-linear"]:
        raise InputError(
            f"target_modules {outside} are outside of the decoder layers, so layers leaves them out; drop one of "
            "the two settings."
        )
    wanted = set(numbers)
    return {name: layer for name, layer in layers.items() if layer_number(name) in wanted}
