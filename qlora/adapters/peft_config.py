"""Convert between our settings and adapter_config.json, and between our tensor names and PEFT's.

PEFT, vLLM and the hub read these files, and theirs load here. An adapter with an unsupported setting is refused by
name, never half loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from qlora.config.fields import is_pattern
from qlora.config.lora import BASE_STARTS, LoRAConfig
from qlora.lora.variant import PeftFields, Variant
from qlora.lora.variants import VARIANTS, variant_of
from qlora.model.families import known_layers
from qlora.system.errors import InputError
from qlora.system.redact import redact
from qlora.system.wording import explain

PREFIX = "base_model.model."
NO_TARGETS = "dummy-target-modules"  # PEFT's, of an adapter that only trains embeddings
# PEFT's fields that change the forward pass, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # Strings here may name an initialization that changed the base: PiSSA can be redone, and LoftQ if it comes
    # with its base shift.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "pissa"),
}


def describe_adapter(config: LoRAConfig, layers: list[str], base_model: str, transposed: bool) -> dict[str, Any]:
    """The adapter_config.json of an adapter with these layers.

    Args:
        transposed: whether they are Conv1D.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": redact(base_model),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _saved_targets(config, layers) or NO_TARGETS,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": config.layers or None,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save or None,
        "fan_in_fan_out": transposed,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "inference_mode": True,
        **{name: value for variant in VARIANTS for name, value in variant.describe(config).items()},
    }


def _saved_targets(config: LoRAConfig, names: list[str]) -> list[str]:
    """The targets as PEFT's list of name endings; "all-linear" and other choices are expanded."""
    targets = config.target_modules
    if config.exclude_modules or any(map(is_pattern, targets)) or not all(map(config.should_adapt, names)):
        return sorted(names)
    return sorted({name.rpartition(".")[2] for name in names}) if targets == ["all-linear"] else targets


def file_key(key: str, layers: Collection[str], variant: Variant | None = None) -> str:
    """PEFT's name of a tensor of `lora_state_dict`; there, an adapted layer's bias belongs to its base layer."""
    key = key if variant is None else variant.file_name(key)
    layer, _, kind = key.rpartition(".")
    return f"{PREFIX}{layer}.base_layer.bias" if kind == "bias" and layer in layers else PREFIX + key


def read_settings(file: Path, description: dict[str, Any]) -> LoRAConfig:
    """The settings of an adapter_config.json; each field's type and range are checked."""

    fields = PeftFields(file, description)
    check, given = fields.check, fields.given

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < torch.finfo(torch.float32).max

    kind = description.get("peft_type")
    rank_name = next((variant.rank_field for variant in VARIANTS if variant.peft_type == kind), "r")
    rank: Any = description.get(rank_name)
    alpha: Any = description.get("lora_alpha")
    dropout: Any = given("lora_dropout", 0.0)
    targets = description.get("target_modules")
    modules: Any = given("modules_to_save", [])
    numbers: Any = given("layers_to_transform", [])
    numbers = [numbers] if type(numbers) is int else numbers
    alphas: Any = given("alpha_pattern", {})
    check(rank_name, "a whole number of 1 or more", type(rank) is int and rank >= 1)
    check("lora_alpha", "a number above 0", is_number(alpha))
    own = {name: value for variant in VARIANTS for name, value in variant.read(fields).items()}
    ranks: Any = own.get("rank_pattern", given("rank_pattern", {}))
    check(
        "lora_dropout",
        "a number from 0 up to, not including, 1",
        type(dropout) in (int, float) and 0 <= dropout < 1,
    )
    listed = targets if isinstance(targets, list) else [targets]
    named = targets is None or all(isinstance(name, str) for name in listed)
    check("target_modules", "a list of names or a pattern", named)
    check("modules_to_save", "a list of names", _is_list_of_names(modules))
    are_numbers = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 10_000 for n in numbers)
    check("layers_to_transform", "a list of layer numbers", are_numbers)
    for name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        fits = (
            isinstance(values, dict) and _is_list_of_names(list(values)) and all(map(is_number, values.values()))
        )
        check(name, "names with numbers above 0", fits)
    check("use_rslora", "true or false", type(given("use_rslora", False)) is bool)
    check("bias", "none, all or lora_only", given("bias", "none") in ("none", "all", "lora_only"))
    try:
        return LoRAConfig(
            rank=rank,
            alpha=float(alpha),
            dropout=float(dropout),
            use_rslora=given("use_rslora", False),
            **{"rank_pattern": ranks} | own,
            alpha_pattern=alphas,
            layers=numbers,
            bias=given("bias", "none"),
            modules_to_save=modules,
            init=start
            if (start := description.get("init_lora_weights")) in ("gaussian", *BASE_STARTS)
            else "kaiming",
        )
    except InputError as error:
        raise InputError(f"{file} does not hold together ({explain(error)}); save the adapter again.") from error


def _is_list_of_names(names: Any) -> bool:
    """Whether these are names that are safe in messages and in lists with commas."""
    return isinstance(names, list) and all(
        isinstance(name, str) and name.isprintable() and "=" not in name and "," not in name for name in names
    )


def own_key(key: str) -> str:
    """A tensor's name in `lora_state_dict`, from its name in a file of any PEFT version."""
    name, dot, kind = key.removeprefix(PREFIX).rpartition(".")
    key = f"{name.removesuffix('.base_layer')}{dot}{kind}"  # of a bias; a layer may be called base_layer itself
    for variant in VARIANTS:
        key = variant.own_name(key)
    return key


def is_vocabulary(name: str) -> bool:
    """Whether a parameter is the weight of an embedding or of an output head."""
    return name.endswith(tuple(f"{layer}.weight" for layer in known_layers("embedding") | {"lm_head"}))


def belongs_to_adapter(key: str, config: LoRAConfig) -> bool:
    """Whether an adapter of this configuration may hold such a tensor."""
    if key.endswith((".lora_A.weight", ".lora_B.weight")):
        return True
    kind = key.rpartition(".")[2]
    owner = next((variant for variant in VARIANTS if kind in variant.extras), None)
    if owner is not None:
        return owner is variant_of(config)
    if is_vocabulary(key) or (key.endswith(".bias") and config.bias != "none"):
        return True
    return key.rpartition(".")[0].endswith(tuple(filter(None, config.modules_to_save)))
