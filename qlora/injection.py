"""Adapters in a whole model: which layers get one, which one computes, what trains, what is saved, how many.

The layer itself and its maths are in lora.py. An adapter at rest is an `Adapter` beside the model; the active
one's parameters hang in the model's modules, so that `model.parameters()` knows nothing of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.lora import LoRALinear, LoRAWeights, squared_norms
from qlora.quantize import logical_numel, logical_shape
from qlora.trained import (
    copy_trained,
    start_new_tokens,
    swap_parameters,
    token_ids_of,
    tokenizer_files,
    trained_names,
)

NUM_LISTED = 50  # mismatches that one error names


# ---- choosing and replacing layers ------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> layer that LoRA can wrap: Linear (4-bit too) and Conv1D, the output head left out.

    A wrapped layer is given by its own name, as the layer inside.
    """
    from transformers.pytorch_utils import Conv1D

    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def match_targets(
    model: nn.Module, targets: Iterable[str], numbers: Iterable[int] | None = None
) -> dict[str, Any]:
    """The layers that `targets` name: a layer's last name(s), its full name, or "all-linear".

    Args:
        numbers: only in these decoder layers, counted from 0; None = in all.
    Raises:
        InputError: a target that matches nothing, with the names there are, or a decoder layer that is not there.
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
    """Which decoder layer a layer is in, counted from 0, by the first number in its name; None: in none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


@dataclass
class Adapter:
    """All that one adapter learns, active in a model or at rest.

    Attributes:
        config: what it was made by.
        layers: qualified layer name -> its weights there.
        trained: parameter name -> a copy of a base parameter that trains in full (biases, embeddings, ...).
        tokenizer: files by name of the tokenizer that goes with the adapter; none where it is the base's.
        budget: t_i, t_f and T of the run in which AdaLoRA trains it, for its file.
    """

    config: LoRAConfig
    layers: dict[str, LoRAWeights]
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    budget: tuple[int, int, int] = (0, 0, 1)


def create_adapter(
    model: nn.Module,
    config: LoRAConfig,
    seed: int = 0,
    tokenizer: Any = None,
    trained: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """A fresh adapter for `model`, which is left as it is; arguments and errors as `inject_lora`.

    Args:
        trained: values of the parameters that train in full; None = the base's, of those that `config` names.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if config.adapter_dtype == "bfloat16" else torch.float32
    weights = {}
    for name, layer in match_targets(model, config.targets, config.layer_numbers).items():
        (rows, columns), device = logical_shape(layer), next(layer.parameters()).device
        rank = config.rank_of(name)
        weights[name] = LoRAWeights(
            columns, rows, rank, config.alpha_of(name), config.dropout, dtype, config.init, generator,
            device, config.scaling_of(name, rank),
        )  # fmt: skip
        if config.use_adalora:
            weights[name].add_singular_values(generator)
        if config.use_dora:  # the outputs' magnitudes as they are, so that c = 1
            weights[name].magnitude = nn.Parameter(squared_norms(layer).sqrt())
    if trained is not None:
        return Adapter(config, weights, copy_trained(model, trained))
    copies = copy_trained(model, trained_names(model, config, list(weights)))
    if not config.added_tokens:
        return Adapter(config, weights, copies)
    copies = start_new_tokens(model, copies, token_ids_of(tokenizer, config.added_tokens))
    return Adapter(config, weights, copies, tokenizer_files(tokenizer))


def wrap_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Wrap the named layers of `model` in place where they are not; they compute as before."""
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(layer, rank=0).train(layer.training))
    model.__dict__["_wrapped_layers"] = _find_wrapped(model)


def activate(model: nn.Module, adapter: Adapter | None) -> None:
    """Let `model` compute with this adapter, or with none: the base, bit for bit. Nothing is copied or read.

    Raises:
        RuntimeError: an adapter is merged.
    """
    layers = wrapped_layers(model)
    if any(layer.merged_weight is not None for layer in layers.values()):
        raise RuntimeError("The adapter is merged; call unmerge before switching to another.")
    if adapter is None and model.__dict__.get("_base_shift"):
        raise InputError(
            "The base was changed for a PiSSA or LoftQ adapter and answers with that alone; load it afresh."
        )
    weights = {} if adapter is None else adapter.layers
    for name, layer in layers.items():  # by dict entry: nn.Module's own setattr takes a microsecond each
        layer._modules["lora"] = weights.get(name)
        layer.__dict__["fixed_scale"] = layer.__dict__["_squared_norms"] = None
    at_rest: dict[str, nn.Parameter] = model.__dict__.pop("_base_parameters", {})
    if at_rest:
        swap_parameters(model, at_rest)
    if adapter is not None and adapter.trained:
        model.__dict__["_base_parameters"] = swap_parameters(model, adapter.trained)
    model.__dict__["_active_adapter"] = adapter


def active_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that `model` computes with."""
    return model.__dict__.get("_active_adapter")


def inject_lora(model: nn.Module, config: LoRAConfig, seed: int = 0, tokenizer: Any = None) -> list[str]:
    """Replace the target layers of `model` by LoRALinear, in place; what trains is left to `freeze_base`.

    Args:
        seed: of A's start. The same seed gives the same adapter on every machine and rank.
        tokenizer: only for `config.new_tokens`, which `trained.add_tokens` has added to it.
    Returns:
        The qualified names of the wrapped layers, in model order.
    Raises:
        InputError: targets that match nothing, or a model that has adapters already.
    """
    if wrapped_layers(model):
        raise InputError("The model has LoRA layers already; inject into a fresh base model.")
    adapter = create_adapter(model, config, seed, tokenizer)
    wrap_layers(model, adapter.layers)
    activate(model, adapter)
    return list(adapter.layers)


def set_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Have the active adapter bring this tokenizer along, as one with new tokens does: its template is its own."""
    adapter = active_adapter(model)
    assert adapter is not None
    adapter.tokenizer = tokenizer_files(tokenizer)


def wrapped_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Qualified name -> LoRALinear, in model order, whether or not the active adapter has something there.

    Looked up where `wrap_layers` has kept them: walking a model's modules takes milliseconds.
    """
    kept: dict[str, LoRALinear] | None = model.__dict__.get("_wrapped_layers")
    return _find_wrapped(model) if kept is None else kept


def _find_wrapped(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Qualified name -> LoRALinear that the active adapter has weights for, in model order."""
    return {name: layer for name, layer in wrapped_layers(model).items() if layer.lora is not None}


# ---- what trains ------------------------------------------------------------------------------------------


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that the active adapter learns, in model order: A and B of every layer, and what trains beside them."""
    adapter = active_adapter(model)
    own = [p for layer in lora_layers(model).values() for p in layer.weights.parameters()]
    return own + (list(dict.fromkeys(adapter.trained.values())) if adapter is not None else [])


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
    for layer in wrapped_layers(model).values():
        layer.unmerge()


# ---- state ------------------------------------------------------------------------------------------------


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All that the active adapter has learned, detached, not copied.

    `<layer>.lora_A.weight` (rank, in), `<layer>.lora_B.weight` (out, rank), under DoRA
    `<layer>.lora_magnitude_vector` (out,), under AdaLoRA `<layer>.lora_E` (rank, 1), and by their own names the
    parameters that train in full.
    """
    adapter = active_adapter(model)
    return {} if adapter is None else {key: value.detach() for key, value in adapter_state(adapter).items()}


def adapter_state(adapter: Adapter) -> dict[str, nn.Parameter]:
    """The parameters of an adapter, active or at rest, by the names of `lora_state_dict`."""
    layers = adapter.layers.items()
    state = {f"{name}.{key}": value for name, weights in layers for key, value in weights_state(weights).items()}
    return {**state, **adapter.trained}


def weights_state(weights: LoRAWeights) -> dict[str, nn.Parameter]:
    """One layer's parameters by the names they are saved under."""
    state = {"lora_A.weight": weights.lora_A, "lora_B.weight": weights.lora_B}
    if weights.magnitude is not None:
        state["lora_magnitude_vector"] = weights.magnitude
    if weights.lora_E is not None:
        state["lora_E"] = weights.lora_E
    return state


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
    first_name: dict[int, str] = {}
    for key in own.keys() & state.keys():
        tied = first_name.setdefault(own[key].data_ptr(), key)
        if key != tied and not torch.equal(state[key], state[tied]):
            problems.append(f"{key} and {tied} are one tensor in the model, but differ")
    if problems:
        raise InputError(f"The adapter in {origin} does not fit this model: {list_problems(sorted(problems))}.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def list_problems(problems: list[str]) -> str:
    """Mismatches as one clause, the first NUM_LISTED of them by name."""
    rest = [f"and {len(problems) - NUM_LISTED} more"] if len(problems) > NUM_LISTED else []
    return "; ".join([*problems[:NUM_LISTED], *rest])


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
