"""Adapters on disk, in the format of PEFT, and `LoRAModel`, an adapter's life in one object.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (rank, in), ...lora_B.weight (out, rank)
    adapter_config.json         rank, alpha, dropout, targets, name of the base model

PEFT, vLLM and the hub read these files, and theirs load here. An adapter that asks for something this
project does not compute (DoRA, per-layer ranks, ...) is refused by name, never half loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.files import new_file
from qlora.lora import (
    ParameterSummary,
    freeze_base,
    inject_lora,
    linear_layers,
    load_lora_state_dict,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    parameter_summary,
    unmerge_lora,
)
from qlora.quantize import logical_shape

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# PEFT's fields that change the forward pass, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # Strings here may name a start that changed the base (PiSSA, LoftQ, OLoRA, ...); these did not.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


def save_adapter(model: nn.Module, directory: str | Path, config: LoRAConfig, base_model: str = "") -> None:
    """Write the adapters of `model` and read them back.

    Each file is written beside its name and renamed: an existing adapter is replaced whole or not at all.

    Args:
        base_model: name or path of the base, recorded for whoever loads the adapter.
    Raises:
        RuntimeError: what was read back is not what the model holds.
    """
    from safetensors.torch import load_file, save_file

    layers = lora_layers(model)
    if not layers:
        raise RuntimeError("The model has no LoRA layers to save.")
    state = {PREFIX + key: t.detach().contiguous().cpu() for key, t in lora_state_dict(model).items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _saved_targets(config, list(layers)),
        "bias": "none",
        "fan_in_fan_out": any(not isinstance(layer.base_layer, nn.Linear) for layer in layers.values()),
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "inference_mode": True,
    }
    quantization = getattr(model, "quantization", None)
    metadata = {"format": "pt", "base_quantization": json.dumps(quantization and asdict(quantization))}
    with new_file(directory / CONFIG) as config_file, new_file(directory / WEIGHTS) as weights_file:
        save_file(state, weights_file, metadata=metadata)
        config_file.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    written = load_file(directory / WEIGHTS)
    if written.keys() != state.keys() or not all(torch.equal(written[k], t) for k, t in state.items()):
        raise RuntimeError(f"{directory / WEIGHTS} does not hold what was written; the disk may be failing.")


def _saved_targets(config: LoRAConfig, names: list[str]) -> list[str]:
    """The targets as PEFT's list of name endings; "all-linear" as the endings it stood for."""
    if config.targets != ["all-linear"]:
        return config.targets
    return sorted({name.rpartition(".")[2] for name in names})


def read_adapter(directory: str | Path) -> tuple[LoRAConfig, dict[str, Tensor], dict[str, Any]]:
    """Read an adapter directory.

    Returns:
        (config, state, description): the config with the exact layer endings as targets, tensors keyed as
        `lora_state_dict`, and the raw adapter_config.json.
    Raises:
        InputError: a file missing or damaged, a foreign key, or a variant this project does not compute.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise InputError(f"The adapter directory {directory} has no {name}; check the path.")
    try:
        description = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        state = load_file(directory / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{directory / CONFIG} is not valid JSON ({error}); save the adapter again.") from error
    except SafetensorError as error:
        raise InputError(
            f"{directory / WEIGHTS} is not a whole safetensors file ({error}); save the adapter again."
        ) from error
    if not isinstance(description, dict):
        raise InputError(f"{directory / CONFIG} holds no JSON object; save the adapter again.")
    kind = description.get("peft_type")
    used = [k for k, neutral in UNSUPPORTED.items() if description.get(k) not in neutral]
    if kind != "LORA" or used:
        what = f"a {kind} adapter" if kind != "LORA" else f"an adapter with {', '.join(used)}"
        raise InputError(f"{directory} holds {what}, which this version does not compute; use plain LoRA.")
    foreign = [k for k in state if not (k.startswith(PREFIX) and k.endswith((".lora_A.weight", ".lora_B.weight")))]
    if foreign or not state:
        raise InputError(f"{directory / WEIGHTS} holds {foreign or 'nothing'}, not LoRA tensors in PEFT's names.")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    layers = sorted({key.rpartition(".lora_")[0] for key in state})
    try:
        config = LoRAConfig(
            rank=int(description["r"]),
            alpha=float(description["lora_alpha"]),
            dropout=float(description.get("lora_dropout") or 0.0),
            target_modules=",".join(layers),
            adapter_dtype="float32" if next(iter(state.values())).dtype == torch.float32 else "bfloat16",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / CONFIG} has no valid r and lora_alpha ({error}).") from error
    return config, state, description


def load_adapter(model: nn.Module, directory: str | Path) -> LoRAConfig:
    """Give a base model the adapter of a directory, in place and frozen all but the adapter.

    A model without LoRA layers gets them where the file says; one that has them gets the values.

    Returns:
        The adapter's configuration, its targets as in the file.
    Raises:
        InputError: every mismatch at once; the model is then unchanged.
    """
    layers = lora_layers(model)
    if any(layer.merged_weight is not None for layer in layers.values()):
        raise RuntimeError("The adapter is merged; call unmerge before loading another.")
    config, state, description = read_adapter(directory)
    if not layers:
        shapes = {name: logical_shape(layer) for name, layer in linear_layers(model).items()}
        check_adapter(state, config.rank, shapes, str(directory))
        inject_lora(model, config)
    load_lora_state_dict(model, state, origin=str(directory))
    for layer in lora_layers(model).values():
        layer.alpha, layer.dropout = config.alpha, config.dropout
    freeze_base(model)
    targets = description.get("target_modules")
    config.target_modules = ",".join(targets) if isinstance(targets, list) else config.target_modules
    return config


def check_adapter(state: dict[str, Tensor], rank: int, shapes: dict[str, tuple[int, int]], origin: str) -> None:
    """Compare an adapter's tensors with the layers of a base, before anything is changed.

    Args:
        shapes: qualified name -> (out, in) of every layer that an adapter could be for.
    Raises:
        InputError: lists every unknown layer, missing half, wrong shape or rank, and non-finite value.
    """
    problems = []
    for layer in sorted({key.rpartition(".lora_")[0] for key in state}):
        if layer not in shapes:
            problems.append(f"{layer} is no linear layer of this model")
            continue
        rows, columns = shapes[layer]
        for part, wanted in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            key = f"{layer}.{part}.weight"
            if key not in state:
                problems.append(f"missing {key}")
            elif tuple(state[key].shape) != wanted:
                shape = tuple(state[key].shape)
                problems.append(f"{key} is {shape} but its layer is ({rows}, {columns}) and the rank {rank}")
            elif not torch.isfinite(state[key]).all():
                problems.append(f"{key} holds NaN or infinity")
    if problems:
        listed = "; ".join(problems)
        raise InputError(f"The adapter in {origin} is damaged or was made for another base: {listed}.")


class LoRAModel(nn.Module):
    """A base model with its adapter: trains, saves, loads, merges.

    Args:
        model: a causal LM; its target layers are replaced in place and everything else is frozen.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, seed: int = 0, base_model: str = "") -> None:
        super().__init__()
        inject_lora(model, config, seed)
        freeze_base(model)
        self.model, self.lora_config, self.base_model = model, config, base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate on the adapted model."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer should get."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of every adapted layer."""
        return lora_parameters(self.model)

    def save(self, directory: str | Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json."""
        save_adapter(self.model, directory, self.lora_config, self.base_model)

    def load(self, directory: str | Path) -> None:
        """Take over the values (and alpha) of a saved adapter of the same layers; every mismatch is an error."""
        config = load_adapter(self.model, directory)
        self.lora_config.alpha, self.lora_config.dropout = config.alpha, config.dropout

    def merge(self) -> None:
        """Compute with merged dense weights from here on; training is then an error."""
        merge_lora(self.model)

    def unmerge(self) -> None:
        """Back to base and adapter, bit for bit."""
        unmerge_lora(self.model)

    @property
    def is_merged(self) -> bool:
        return any(layer.merged_weight is not None for layer in lora_layers(self.model).values())

    def summary(self) -> ParameterSummary:
        """Logical parameter counts; print it."""
        return parameter_summary(self.model)


def get_lora_model(
    model: nn.Module, config: LoRAConfig | None = None, seed: int = 0, base_model: str = ""
) -> LoRAModel:
    """Adapt `model` in place with q_proj and v_proj adapters by default, everything else frozen."""
    return LoRAModel(model, config or LoRAConfig(), seed, base_model)
