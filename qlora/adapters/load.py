"""Load a saved adapter into a model: check it, prepare the base it needs, put it in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qlora.adapters.peft_files import SavedAdapter, read_adapter, written_config
from qlora.adapters.provenance import recorded_base
from qlora.config.fields import check_pattern, flag_of, to_text
from qlora.config.lora import LoRAConfig
from qlora.data.tokenizer_files import read_tokenizer_files
from qlora.lora.adapter import activate, active_adapter, create_adapter, wrap_layers, wrapped_layers
from qlora.lora.base_shift import base_shift, check_base, pissa_shift, same_shift, shift_base
from qlora.lora.full_parameters import base_shapes, named_base_parameters, trained_names, trained_problems
from qlora.lora.slot import Adapter, network_of
from qlora.lora.state import adapter_state, load_lora_state_dict
from qlora.lora.targets import head_name, layer_number, linear_layers, match_targets
from qlora.lora.trainable import freeze_base
from qlora.lora.variants import variant_of
from qlora.model.base import find_base_info
from qlora.model.skeleton import empty_model
from qlora.quant.layers import logical_shape
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG
from qlora.system.redact import redact
from qlora.system.wording import explain, list_first, show_value

SAME_WEIGHT = 0.2  # relative difference of a weight in 16 bits from the same one in 4


def load_adapter(
    model: nn.Module, directory: str | Path, base_model: str = "", say: Callable[[str], Any] = print
) -> LoRAConfig:
    """Load the adapter in a directory into a model, in place; everything else is frozen.

    If an adapter is active, it takes over the saved values and settings; otherwise this one becomes active.

    Args:
        base_model: name or path of `model`; `say` is called if the adapter names another.
    Returns:
        The adapter's configuration, with targets as in the file.
    Raises:
        InputError: lists every mismatch; the model is unchanged.
    """
    model = network_of(model)
    if any(layer.merged_weight is not None for layer in wrapped_layers(model).values()):
        raise RuntimeError("The adapter is merged; call unmerge before loading another.")
    active = active_adapter(model)
    saved = settle_base(read_adapter(directory), model)
    if active is None:
        adapter = build_adapter(saved, model)
        wrap_layers(model, adapter.layers)
        activate(model, adapter)
    else:
        check_adapter(saved, model)
        load_lora_state_dict(model, saved.state, origin=str(directory))
        active.config = written_config(saved)
        for name, weights in active.layers.items():
            weights.alpha, weights.dropout = saved.config.alpha_of(name), saved.config.dropout
            weights.scaling = saved.config.scaling_of(name, weights.rank)
    freeze_base(model)
    compare_base(saved, base_model, say)
    return written_config(saved)


def check_before_loading(directories: Iterable[str | Path], base: str) -> None:
    """Check adapters against the modules of a base, before any of its weights is read or downloaded.

    Args:
        base: directory, hub id or .gguf.
    Raises:
        InputError: as `load_adapter`.
    """
    saved = [read_adapter(directory) for directory in directories]
    network: Any = empty_model(base) if saved else None
    for adapter in saved:
        check_adapter(adapter, network)


def continued_config(asked: LoRAConfig, saved: SavedAdapter, base: str) -> LoRAConfig:
    """The settings with which training goes on from an adapter: its own, and `asked` for the optimizer.

    Args:
        base: directory, hub id or .gguf; its modules tell which layers `asked` names.
    Raises:
        InputError: names the settings of `asked` that are neither the default nor the adapter's.
    """
    own, default = written_config(saved), vars(LoRAConfig())
    theirs = {**vars(own), "lora_plus_ratio": asked.lora_plus_ratio}
    which = ("target_modules", "layers", "exclude_modules")
    skipped = (*which, "new_tokens")
    different = [
        name
        for name, value in vars(asked).items()
        if name not in skipped and value != default[name] and not _is_within(value, theirs[name])
    ]
    if different:
        given = ", ".join(f"{flag_of(name)} {to_text(getattr(asked, name))}" for name in different)
        has = ", ".join(f"{name} {str(to_text(theirs[name])) or 'none'}" for name in different)
        raise InputError(
            f"{given} would change nothing: --adapter {saved.directory} goes on with its own {has}; leave it out, "
            "or begin a new adapter."
        )
    if any(getattr(asked, name) != default[name] for name in which):
        network = empty_model(base)
        named = match_targets(network, asked.target_modules, asked.layers or None, asked.exclude_modules)
        if sorted(named) != saved.adapted_layers:
            within = " within --layers" if asked.layers else ""
            raise InputError(
                f"--target-modules {to_text(asked.target_modules)}{within} names {len(named)} layers, but "
                f"--adapter {saved.directory} goes on with its own {len(saved.adapted_layers)}; leave them out, "
                "or begin a new adapter."
            )
    return replace(own, lora_plus_ratio=asked.lora_plus_ratio)


def _is_within(value: Any, theirs: Any) -> bool:
    """Equality; of a list of names whether each is the end of one of theirs."""
    if not isinstance(value, list):
        return bool(value == theirs)
    return all(any(f".{own}".endswith(f".{name}") for own in theirs) for name in value)


def compare_base(saved: SavedAdapter, base_model: str, say: Callable[[str], Any]) -> None:
    """Report if the adapter names a base other than `base_model`. This is no error: people move directories."""
    named = saved.description.get("base_model_name_or_path")
    theirs, ours = (Path(name).name if isinstance(name, str) else "" for name in (named, base_model))
    if theirs and ours and theirs != ours:
        say(f"note: the adapter {saved.directory} names {show_value(theirs)} as its base, not {redact(ours)}")


def build_adapter(saved: SavedAdapter, model: nn.Module) -> Adapter:
    """Make a saved adapter an inactive `Adapter` on the device of `model`, which is not changed.

    Raises:
        InputError: lists every mismatch (`check_adapter`).
    """
    check_adapter(saved, model)
    check_base(model, saved.base_shift, ready=True)
    adapter = create_adapter(model, saved.config, trained=saved.trained)
    with torch.no_grad():
        for key, parameter in adapter_state(adapter).items():
            parameter.copy_(saved.state[key])
    adapter.config, adapter.tokenizer = written_config(saved), read_tokenizer_files(saved.directory)
    variant = variant_of(saved.config)
    numbers = {name: saved.description.get(name) for name in (variant.run_fields if variant is not None else ())}
    if all(type(number) is int for number in numbers.values()):  # only written back to a file
        adapter.run_fields = cast(dict[str, int], numbers)
    return adapter


def settle_base(saved: SavedAdapter, model: nn.Module) -> SavedAdapter:
    """Change the base of `model` to the one that the adapter was trained on, if PiSSA or LoftQ shifted it.

    Returns:
        The adapter, with its base shift even if PEFT's file omits it.
    Raises:
        InputError: a mismatch, or other adapters share the base; the model is unchanged.
    """
    info = find_base_info(model)
    check_calibration(saved, None if info is None else info.quantization)
    saved = with_whole_rows(saved, model)
    saved = with_base_shift(saved, model, None if info is None else info.source)
    if not same_shift(base_shift(model), saved.base_shift):
        check_adapter(saved, model)
        check_base(model, saved.base_shift)
        shift_base(model, saved.base_shift)
    return saved


def check_calibration(saved: SavedAdapter, quant: QuantConfig | None) -> None:
    """Check that a 4-bit base has the codes that an adapter was trained on, if the adapter says which.

    Args:
        quant: of the base; None for 16 bits, on which any adapter may be used.
    Raises:
        InputError: it has others.
    """
    if quant is None:
        return
    recorded = recorded_base(str(saved.directory))
    trained = None if recorded is None else recorded.quantization
    if trained is not None and trained.calibration != quant.calibration:
        theirs, own = (one.calibration or "none" for one in (trained, quant))
        raise InputError(
            f"The adapter {saved.directory} was trained on a 4-bit base with another calibration ({theirs}; this "
            f'one: {own}); load the base with QuantConfig(calibration="{trained.calibration}"), or in 16 bits.'
        )


def with_whole_rows(saved: SavedAdapter, model: nn.Module) -> SavedAdapter:
    """Make trained rows of an embedding, or LoRA on it, one trained parameter with the base's values.

    If the base ties it to the head, trained rows are the head's, too; LoRA is not, as in PEFT.
    """
    if not saved.rows:
        return saved
    check_adapter(saved, model)
    base, state = dict(named_base_parameters(model)), dict(saved.state)
    for name, change in saved.rows.items():
        whole = change.apply(base[name].detach().float())
        if change.is_tied:
            state |= {other: whole for other, p in base.items() if p is base[name] and other not in saved.rows}
        state[name] = whole
    modules = [name.rpartition(".")[0] for name in state.keys() - saved.state.keys()]
    config = replace(saved.config, modules_to_save=[*saved.config.modules_to_save, *sorted(modules)])
    description, targets = saved.description, saved.description.get("target_modules")
    if isinstance(targets, list):  # an embedding is no longer one of them
        inner = [name.rpartition(".")[0] for name in saved.rows]
        kept = [target for target in targets if not any(_names([target], layer) for layer in inner)]
        description = {**description, "target_modules": kept}
    return replace(saved, state=state, config=config, description=description, rows={})


def with_base_shift(saved: SavedAdapter, model: nn.Module, source: str | None) -> SavedAdapter:
    """Add the missing base shift to a PiSSA adapter of PEFT; other adapters are returned unchanged.

    Args:
        model: the base, for its shapes; may be on the meta device.
        source: the base's source, as for `load_base_model`.
    """
    if saved.config.init != "pissa" or saved.base_shift:
        return saved
    check_adapter(saved, model)
    if source is None:
        raise InputError(f"{saved.directory} wants its base's original weights; load that with load_base_model.")
    settings = saved.config
    scalings = {}
    for layer in saved.adapted_layers:
        rank = settings.rank_of(layer)
        scalings[layer] = rank, settings.scaling_of(layer, rank)
    return replace(saved, base_shift=pissa_shift(source, scalings))


def check_adapter(saved: SavedAdapter, model: nn.Module) -> None:
    """Check an adapter's tensors against a base, before anything is changed.

    Args:
        model: the base; may be on the meta device.
    Raises:
        InputError: lists every unknown layer, missing part, wrong shape or rank, and non-finite value.
    """
    layers = {name: logical_shape(layer) for name, layer in linear_layers(model).items()}
    variant, problems = variant_of(saved.config), list[str]()
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in saved.adapted_layers:
        if layer not in layers:
            problems.append(f"{layer} is not a linear layer of this model")
            continue
        (rows, columns), rank = layers[layer], saved.config.rank_of(layer)
        wanted[f"{layer}.lora_A.weight"], wanted[f"{layer}.lora_B.weight"] = (rank, columns), (rows, rank)
        if variant is not None:
            wanted |= {f"{layer}.{name}": shape for name, shape in variant.shapes(rows, rank).items()}
    problems += [f"{layer} has no tensors, but {CONFIG} announces it" for layer in _missing_layers(saved, model)]
    parameters = base_shapes(model)
    problems += _row_problems(saved, parameters)
    problems += trained_problems(model, saved.trained)
    adapted = [name for name in saved.adapted_layers if name in layers]
    try:
        trained = trained_names(model, saved.config, adapted, tied=False)
    except InputError as error:
        problems.append(explain(error))
        trained = []
    wanted |= {name: parameters[name] for name in trained if name not in saved.trained}
    ends = tuple(
        filter(None, saved.description.get("modules_to_save") or ())
    )  # PEFT's rule: the end of a module's name
    whole = [name for name in parameters if ends and name.rpartition(".")[0].endswith(ends)]
    wanted |= {name: parameters[name] for name in whole if name not in saved.trained}
    for name in saved.trained:
        if trained and name in parameters and name not in trained:
            problems.append(f"{name} is not trained by the bias and modules_to_save of {CONFIG}")
    if saved.config.bias == "lora_only" and any(n not in saved.state and n.endswith(".bias") for n in trained):
        problems.append(
            "older versions of PEFT write no biases of bias = lora_only (train with bias = all, or set bias to "
            f"none in {CONFIG} to load the adapter without them)"
        )
    for layer, (A, B) in saved.base_shift.items():
        if layers.get(layer) != (len(B), A.shape[1]):
            here = layers.get(layer, "no layer")
            problems.append(f"the base shift of {layer} is {(len(B), A.shape[1])}, but here it is {here}")
    problems += _base_weight_problems(saved, parameters, model)
    for key, shape in wanted.items():
        tensor = saved.state.get(key)
        if tensor is None:
            problems.append(f"missing {key}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{key} is {tuple(tensor.shape)} but its layer and rank want {shape}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        listed = list_first(problems)
        raise InputError(f"The adapter in {saved.directory} is damaged or was made for another base: {listed}.")


def _base_weight_problems(
    saved: SavedAdapter, shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> list[str]:
    """Why the base's weights in an adapter's file are not this base's; a base in fewer bits differs a little."""
    problems = []
    here = dict(named_base_parameters(model))
    for name, theirs in saved.base_weights.items():
        if tuple(theirs.shape) != shapes.get(name):
            problems.append(
                f"its base has {name} of {tuple(theirs.shape)}, this one of {shapes.get(name, 'none')}"
            )
            continue
        ours = here[name].detach()
        if not ours.is_meta:
            error = (ours.float() - theirs.to(ours.device).float()).norm() / ours.float().norm()
            if not error < SAME_WEIGHT:
                problems.append(f"its base has other values of {name} (relative difference {error:.2g})")
    return problems


def _row_problems(saved: SavedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why trained rows do not fit this base's parameters."""
    problems = []
    for name, change in saved.rows.items():
        shape = shapes.get(name, ())
        if len(shape) != 2 or shape[1] != change.width:
            here = shape or "no such"
            problems.append(f"the {change} of {name} are {change.width} wide, but this base has {here}")
        elif misfit := change.misfit(shape[0]):
            problems.append(f"{name} has {misfit}")
        elif not all(torch.isfinite(tensor).all() for tensor in change.tensors):
            problems.append(f"the {change} of {name} hold NaN or infinity")
    return problems


def _missing_layers(saved: SavedAdapter, model: nn.Module) -> list[str]:
    """Layers of this base that the adapter's config names and its file leaves out: half an adapter."""
    fields = ("target_modules", "layers_to_transform", "exclude_modules")
    targets, numbers, excluded = (saved.description.get(field) for field in fields)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    layers, head = list(linear_layers(model)), head_name(model)
    try:
        for pattern in (targets, excluded):
            if isinstance(pattern, str) and pattern:
                check_pattern(pattern)
    except (re.error, ValueError):  # PEFT could not have used it, or it could take forever to fail
        return []
    named = (
        [name for name in layers if name != head]
        if targets == "all-linear"
        else [name for name in (*embeddings, *layers) if _names(targets, name)]
    )
    named = [name for name in named if not _names(excluded, name)]
    if numbers is not None:
        wanted = {numbers} if type(numbers) is int else set(numbers)
        named = [name for name in named if layer_number(name) in wanted or not wanted]
    there = {*saved.adapted_layers, *(name.removesuffix(".weight") for name in saved.rows)}
    return [name for name in named if name not in there]


def _names(which: Any, name: str) -> bool:
    """PEFT's rule: a text is a regular expression for the whole name, a list holds ends of names."""
    if isinstance(which, str):
        return bool(which) and re.fullmatch(which, name) is not None
    return isinstance(which, list) and f".{name}".endswith(tuple(f".{end}" for end in which))
