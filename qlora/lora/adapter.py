"""Create adapters for a model, put them in place and switch between them.

The layer and its math are in layer.py. An inactive adapter is an `Adapter` outside the model; only the active
one's parameters are in the model's modules and in `model.parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.fields import fits_pattern
from qlora.config.lora import LoRAConfig
from qlora.data.tokenizer_files import token_ids_of, tokenizer_files
from qlora.lora.full_parameters import copy_trained, start_new_tokens, swap_parameters, trained_names
from qlora.lora.layer import LoRALinear, LoRAWeights, draw_A
from qlora.lora.slot import Adapter, network_of, slot_of
from qlora.lora.targets import match_targets, resolve_targets
from qlora.lora.variants import variant_of
from qlora.quant.layers import keep_unpacked, logical_shape
from qlora.quant.library import Params4bit
from qlora.quant.linear import explain_not_plain, is_plain
from qlora.system.errors import InputError
from qlora.system.wording import list_first


def create_adapter(
    model: nn.Module,
    config: LoRAConfig,
    seed: int = 0,
    tokenizer: Any = None,
    trained: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Create a fresh adapter for `model` without changing the model; seed, tokenizer and errors as `inject_lora`.

    Args:
        trained: values of the parameters that train in full; None = the base's values of those `config` names.
    """
    model = network_of(model)
    if not isinstance(config, LoRAConfig):
        raise InputError(f"config is {config!r:.80}; give a LoRAConfig.")
    replace(config)  # checks lists that were changed in place
    if type(seed) is not int:
        raise InputError(f"seed is {seed!r:.80}; give a whole number.")
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if config.adapter_dtype == "bfloat16" else torch.float32
    weights, variant = {}, variant_of(config)
    targets, layers = resolve_targets(model, config.target_modules), {}
    if trained is None or targets:  # a saved one may change embeddings alone
        layers = match_targets(model, targets, config.layers or None, config.exclude_modules)
    if targets != config.target_modules:
        config = replace(config, target_modules=targets)
    _check_layers(model, layers, config)
    patterns = [*config.rank_pattern, *config.alpha_pattern] if trained is None else []
    unused = [pattern for pattern in patterns if not any(fits_pattern(name, pattern) for name in layers)]
    if unused:
        raise InputError(
            f"rank_pattern or alpha_pattern {unused} names none of the layers to adapt; correct or drop it."
        )
    for name, layer in layers.items():
        (rows, columns), device = logical_shape(layer), next(layer.parameters()).device
        rank = config.rank_of(name)
        spread = config.init_std if config.init == "gaussian" else config.kaiming_a
        A = draw_A(rank, columns, config.init, generator, device, spread)
        scaling = config.scaling_of(name, rank)
        own = LoRAWeights(A, rows, config.alpha_of(name), config.dropout, dtype, device, scaling)
        weights[name], own.variant = own, variant
        if variant is not None:
            variant.start(own, layer, generator)
    if trained is not None:
        return Adapter(config, weights, copy_trained(model, trained))
    copies = copy_trained(model, trained_names(model, config, list(weights)))
    if not config.new_tokens:
        return Adapter(config, weights, copies)
    copies = start_new_tokens(model, copies, token_ids_of(tokenizer, config.new_tokens))
    return Adapter(config, weights, copies, tokenizer_files(tokenizer))


def _check_layers(model: nn.Module, layers: Mapping[str, nn.Module], config: LoRAConfig) -> None:
    """Refuse layers, by name, that an adapter of this configuration would not compute right in."""
    variant, problems = variant_of(config), list[str]()
    for name, layer in layers.items():
        weight: Any = getattr(layer, "weight", None)
        owner = model.get_submodule(name.rpartition(".")[0])
        if name == "":
            problems.append("the model is one linear layer itself; put it into nn.Sequential")
        elif isinstance(weight, nn.parameter.UninitializedParameter):
            problems.append(f"{name} has no shape yet; run the model once before adapting it")
        elif isinstance(weight, Params4bit) and weight.quant_state is None:
            problems.append(f"{name} is not quantized yet; move the model to its device first")
        elif variant is not None and variant.needs_weight and not is_plain(layer):
            problems.append(f"{name} {explain_not_plain(layer)}; adapt it without {variant.flag}")
        elif isinstance(owner, nn.MultiheadAttention) and config.dropout:
            problems.append(f"{name} is read by nn.MultiheadAttention, which skips dropout; set dropout to 0")
    if problems:
        raise InputError(f"These layers cannot be adapted: {list_first(problems)}.")


def wrap_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Wrap the named layers of `model` in place, wherever it uses them, unless they are wrapped.

    They compute as before.
    """
    model = network_of(model)
    keep_unpacked(model)
    wrapped: dict[int, LoRALinear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LoRALinear):
            wrapped[id(layer)] = LoRALinear(layer, rank=0).train(layer.training)
    for module in list(model.modules()) if wrapped else []:
        for child, own in module._modules.items():  # every use of a shared layer
            if id(own) in wrapped and not isinstance(module, LoRALinear):
                module._modules[child] = wrapped[id(own)]
    slot_of(model).wrapped = _find_wrapped(model)


def activate(model: nn.Module, adapter: Adapter | None) -> None:
    """Make `model` compute with this adapter, or with None as the base, bit for bit. Nothing is copied or read.

    Raises:
        RuntimeError: an adapter is merged.
    """
    model = network_of(model)
    slot, layers = slot_of(model), wrapped_layers(model)
    if any(layer.merged_weight is not None for layer in layers.values()):
        raise RuntimeError("The adapter is merged; call unmerge before switching to another.")
    if adapter is None and slot.shift:
        raise InputError(
            "The base was changed for a PiSSA or LoftQ adapter and answers with that alone; load it afresh."
        )
    weights = {} if adapter is None else adapter.layers
    for name, layer in layers.items():  # by dict entry: nn.Module's own setattr takes a microsecond each
        layer._modules["lora"] = weights.get(name)
        layer.__dict__["fixed_scale"] = layer.__dict__["kept_of_base"] = None
    swap_parameters(model, slot.replaced)
    slot.replaced = {} if adapter is None else swap_parameters(model, adapter.trained)
    slot.active = adapter


def active_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that `model` computes with."""
    return slot_of(model).active


def inject_lora(
    model: nn.Module,
    config: LoRAConfig,
    seed: int = 0,
    tokenizer: Any = None,
    say: Callable[[str], Any] = print,
) -> list[str]:
    """Replace the target layers of `model` by LoRALinear, in place. Call `freeze_base` to choose what trains.

    Args:
        seed: for A's initial values. The same seed gives the same adapter on every machine and rank.
        tokenizer: only for `config.new_tokens`, which `trained.add_tokens` has added to it.
        say: called if the default targets go by other names in this model.
    Returns:
        The qualified names of the wrapped layers, in model order.
    Raises:
        InputError: a target matches nothing, or the model has adapters already.
    """
    model = network_of(model)
    if wrapped_layers(model):
        raise InputError("The model has LoRA layers already; inject into a fresh base model.")
    adapter = create_adapter(model, config, seed, tokenizer)
    say_targets(adapter, config, say)
    wrap_layers(model, adapter.layers)
    activate(model, adapter)
    return list(adapter.layers)


def say_targets(adapter: Adapter, asked: LoRAConfig, say: Callable[[str], Any]) -> None:
    """Say in one line which layers were adapted in the place of the default ones."""
    if adapter.config.target_modules != asked.target_modules:
        names = ", ".join(adapter.config.target_modules)
        say(f"target_modules: {names}, since this model has no {' or '.join(asked.target_modules)}")


def set_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Store this tokenizer with the active adapter, which then has a chat template of its own."""
    adapter = active_adapter(model)
    assert adapter is not None
    adapter.tokenizer = tokenizer_files(tokenizer)


def wrapped_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Qualified name -> LoRALinear, in model order, including layers that the active adapter leaves alone.

    `wrap_layers` keeps the list, since walking a model's modules takes milliseconds.
    """
    kept = slot_of(model).wrapped
    return _find_wrapped(model) if kept is None else kept


def _find_wrapped(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Qualified name -> LoRALinear that the active adapter has weights for, in model order."""
    return {name: layer for name, layer in wrapped_layers(model).items() if layer.lora is not None}
