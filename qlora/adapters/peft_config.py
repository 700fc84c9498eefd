"""adapter_config.json and our settings: PEFT's fields, written and read, and the names of tensors in its files.

PEFT, vLLM and the hub read these files, and theirs load here. An adapter that asks for something this project does
not compute is refused by name, never half loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from qlora.config.lora import LoRAConfig
from qlora.lora.adalora import ORTHOGONALITY, SMOOTHING
from qlora.system.errors import InputError
from qlora.system.redact import redact
from qlora.system.wording import explain, quote


def describe_adalora(
    config: LoRAConfig, rank_pattern: dict[str, list[bool]] | None, budget: tuple[int, int, int]
) -> dict[str, Any]:
    """What an AdaLoRA adapter's adapter_config.json says otherwise than that of LoRA.

    Args:
        budget: t_i, t_f and T of the run; PEFT wants them to load an adapter.
    """
    t_i, t_f, total = budget
    return {
        "peft_type": "ADALORA",
        "r": 8,  # PEFT's default: it reads init_r
        "init_r": config.rank,
        "target_r": config.adalora_target_rank or max(1, config.rank // 2),
        "tinit": t_i,
        "tfinal": t_f,
        "total_step": total,
        "deltaT": config.adalora_interval,
        "beta1": SMOOTHING,
        "beta2": SMOOTHING,
        "orth_reg_weight": ORTHOGONALITY,
        "rank_pattern": rank_pattern,
    }


PREFIX = "base_model.model."
STARTS = ("gaussian", "pissa", "loftq")
VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight")  # ends of embeddings' and heads' names
# PEFT's fields that change the forward pass, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "lora_bias": (None, False),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # Strings here may name a start that changed the base; of those PiSSA can be done again, and LoftQ where it
    # comes with its base shift.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "pissa"),
}


def describe_adapter(config: LoRAConfig, layers: list[str], base_model: str, transposed: bool) -> dict[str, Any]:
    """The adapter_config.json of an adapter of these layers.

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
        "target_modules": _saved_targets(config, layers),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": config.layers or None,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save or None,
        "fan_in_fan_out": transposed,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "inference_mode": True,
    }


def _saved_targets(config: LoRAConfig, names: list[str]) -> list[str]:
    """The targets as PEFT's list of name endings; "all-linear" as the endings it stood for."""
    if config.target_modules != ["all-linear"]:
        return config.target_modules
    return sorted({name.rpartition(".")[2] for name in names})


def file_key(key: str, layers: Collection[str], use_adalora: bool = False) -> str:
    """PEFT's name of a tensor of `lora_state_dict`: it knows the bias of an adapted layer as its base layer's."""
    if use_adalora and ".lora_" in key:
        key = key.removesuffix(".weight")
    layer, _, kind = key.rpartition(".")
    return f"{PREFIX}{layer}.base_layer.bias" if kind == "bias" and layer in layers else PREFIX + key


def read_settings(file: Path, description: dict[str, Any]) -> LoRAConfig:
    """The settings of an adapter_config.json; each field's type and range are checked."""

    def check(field: str, wanted: str, fits: bool) -> None:
        if not fits:
            value = quote(description[field]) if field in description else "no value"
            raise InputError(f"{file} has {field} = {value}, not {wanted}; save the adapter again.")

    def given(field: str, default: Any) -> Any:
        value = description.get(field)
        return default if value is None else value

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < torch.finfo(torch.float32).max

    is_adalora = description.get("peft_type") == "ADALORA"
    rank_name = "init_r" if is_adalora else "r"
    rank: Any = description.get(rank_name)
    alpha: Any = description.get("lora_alpha")
    dropout: Any = given("lora_dropout", 0.0)
    targets = description.get("target_modules")
    modules: Any = given("modules_to_save", [])
    numbers: Any = given("layers_to_transform", [])
    numbers = [numbers] if type(numbers) is int else numbers
    ranks: Any = {} if is_adalora else given("rank_pattern", {})
    alphas: Any = given("alpha_pattern", {})
    check(rank_name, "a whole number of 1 or more", type(rank) is int and rank >= 1)
    check("lora_alpha", "a number above 0", is_number(alpha))
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
    target: Any = given("target_r", 0) if is_adalora else 0
    interval: Any = given("deltaT", 1) if is_adalora else 10
    check("target_r", "a whole number", type(target) is int and target >= 0)
    check("deltaT", "a whole number of 1 or more", type(interval) is int and interval >= 1)
    for name in ("use_rslora", "use_dora"):
        check(name, "true or false", type(given(name, False)) is bool)
    check("bias", "none, all or lora_only", given("bias", "none") in ("none", "all", "lora_only"))
    try:
        return LoRAConfig(
            rank=rank,
            alpha=float(alpha),
            dropout=float(dropout),
            use_rslora=given("use_rslora", False),
            use_dora=given("use_dora", False),
            use_adalora=is_adalora,
            adalora_target_rank=min(target, rank),
            adalora_interval=interval,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            layers=numbers,
            bias=given("bias", "none"),
            modules_to_save=modules,
            init=start if (start := description.get("init_lora_weights")) in STARTS else "kaiming",
        )
    except InputError as error:
        raise InputError(f"{file} does not hold together ({explain(error)}); save the adapter again.") from error


def _is_list_of_names(names: Any) -> bool:
    """Names that can go into messages, and between commas."""
    return isinstance(names, list) and all(
        isinstance(name, str) and name.isprintable() and "=" not in name and "," not in name for name in names
    )


def own_key(key: str) -> str:
    """A tensor's name in `lora_state_dict`, from its name in a file of any version of PEFT."""
    key = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if key.endswith((".lora_A", ".lora_B")):  # AdaLoRA's
        return f"{key}.weight"
    return key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key


def belongs_to_adapter(key: str, config: LoRAConfig) -> bool:
    """Whether an adapter of this configuration may hold such a tensor."""
    if key.endswith((".lora_A.weight", ".lora_B.weight")):
        return True
    if key.endswith(".lora_magnitude_vector"):
        return config.use_dora
    if key.endswith(".lora_E"):
        return config.use_adalora
    if key.endswith(VOCABULARY) or (key.endswith(".bias") and config.bias != "none"):
        return True
    module = "." + key.rpartition(".")[0]
    return any(module.endswith("." + name) for name in config.modules_to_save)
