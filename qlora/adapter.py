"""Adapters on disk, in the format of PEFT, and `LoRAModel`, an adapter's life in one object.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (rank, in), ...lora_B.weight (out, rank)
    adapter_config.json         rank, alpha, dropout, targets, name of the base model

PEFT, vLLM and the hub read these files, and theirs load here. An adapter that asks for something this
project does not compute (DoRA, per-layer ranks, ...) is refused by name, never half loaded.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config import LoRAConfig
from qlora.errors import InputError, is_out_of_memory
from qlora.files import explain, new_file, read_json
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
from qlora.redact import redact

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_LISTED = 50  # mismatches that one error names
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


@dataclass(frozen=True)
class AdapterSnapshot:
    """What an adapter's two files will hold, apart from the model: training may go on while it is written.

    Attributes:
        state: tensors in PEFT's names, copies in main memory.
        description: adapter_config.json.
        metadata: of the safetensors file.
    """

    state: dict[str, Tensor]
    description: dict[str, Any]
    metadata: dict[str, str]


def snapshot_adapter(model: nn.Module, config: LoRAConfig, base_model: str = "") -> AdapterSnapshot:
    """Copy the adapters of `model` as they are now.

    Args:
        base_model: name or path of the base, recorded for whoever loads the adapter.
    """
    layers = lora_layers(model)
    if not layers:
        raise RuntimeError("The model has no LoRA layers to save.")
    state = {PREFIX + key: t.detach().to("cpu", copy=True) for key, t in lora_state_dict(model).items()}
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": redact(base_model),
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
    # One key and no more: safetensors writes several in no fixed order, and equal adapters should be equal files.
    metadata = {"base_quantization": json.dumps(quantization and asdict(quantization))}
    return AdapterSnapshot(state, description, metadata)


def write_adapter(snapshot: AdapterSnapshot, directory: str | Path) -> None:
    """Write both files of an adapter and read them back.

    Each file is written beside its name and renamed: an existing adapter is replaced whole or not at all.

    Raises:
        RuntimeError: what was read back is not what was to be written.
    """
    from safetensors.torch import load_file, save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with new_file(directory / CONFIG) as config_file, new_file(directory / WEIGHTS) as weights_file:
        save_file(snapshot.state, weights_file, metadata=snapshot.metadata)
        config_file.write_text(json.dumps(snapshot.description, indent=2, sort_keys=True) + "\n")
    written = load_file(directory / WEIGHTS)
    if written.keys() != snapshot.state.keys() or not all(
        torch.equal(written[k], t) for k, t in snapshot.state.items()
    ):
        raise RuntimeError(f"{directory / WEIGHTS} does not hold what was written; the disk may be failing.")


def save_adapter(model: nn.Module, directory: str | Path, config: LoRAConfig, base_model: str = "") -> None:
    """Write the adapters of `model` as they are now; arguments and errors as the two above."""
    write_adapter(snapshot_adapter(model, config, base_model), directory)


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
    directory = Path(directory)
    _check_files(directory)
    description = read_json(directory / CONFIG, "save the adapter again", unique_keys=True)
    kind = description.get("peft_type")
    used = [k for k, neutral in UNSUPPORTED.items() if description.get(k) not in neutral]
    if kind != "LORA" or used:
        what = f"a {_show(kind)} adapter" if kind != "LORA" else f"an adapter with {', '.join(used)}"
        raise InputError(f"{directory} holds {what}, which this version does not compute; use plain LoRA.")
    config = _read_settings(directory / CONFIG, description)
    state = _read_tensors(directory / WEIGHTS)
    ranks = {t.shape[0] for key, t in state.items() if key.endswith(".lora_A.weight") and t.dim() == 2}
    if ranks and config.rank not in ranks:
        raise InputError(
            f"{directory / CONFIG} has r = {config.rank}, but the tensors in {WEIGHTS} have rank "
            f"{', '.join(map(str, sorted(ranks)[:5]))}; save the adapter again."
        )
    config.target_modules = ",".join(sorted({key.rpartition(".lora_")[0] for key in state}))
    # The narrowest dtype that holds every value exactly.
    config.adapter_dtype = "bfloat16" if {t.dtype for t in state.values()} == {torch.bfloat16} else "float32"
    return config, state, description


def _check_files(directory: Path) -> None:
    """Both files are there; where only a pickle is, say why it will not do."""
    try:
        missing = [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
        pickle = directory / "adapter_model.bin"
        if WEIGHTS in missing and pickle.is_file():
            raise InputError(
                f"The adapter directory {directory} has no {WEIGHTS}, only {pickle.name}, a pickle, which can run "
                "code and is never loaded; save the adapter as safetensors."
            )
    except OSError as error:
        raise InputError(
            f"The adapter directory {directory} cannot be read ({explain(error)}); check the path."
        ) from error
    if missing:
        raise InputError(f"The adapter directory {directory} has no {missing[0]}; check the path.")


def _read_settings(file: Path, description: dict[str, Any]) -> LoRAConfig:
    """Rank, alpha and dropout; each field's type and range are checked, and that of target_modules."""

    def check(field: str, wanted: str, fits: bool) -> None:
        if not fits:
            value = reprlib.repr(description[field])[:60] if field in description else "no value"
            raise InputError(f"{file} has {field} = {value}, not {wanted}; save the adapter again.")

    def is_number(value: Any) -> bool:
        return type(value) in (int, float)

    rank: Any = description.get("r")
    alpha: Any = description.get("lora_alpha")
    dropout: Any = description["lora_dropout"] if description.get("lora_dropout") is not None else 0.0
    targets = description.get("target_modules")
    check("r", "a whole number of 1 or more", type(rank) is int and rank >= 1)
    check("lora_alpha", "a number above 0", is_number(alpha) and 0 < alpha < torch.finfo(torch.float32).max)
    check("lora_dropout", "a number from 0 up to, not including, 1", is_number(dropout) and 0 <= dropout < 1)
    listed = targets if isinstance(targets, list) else [targets]
    named = targets is None or all(isinstance(name, str) for name in listed)
    check("target_modules", "a list of names or a pattern", named)
    return LoRAConfig(rank=rank, alpha=float(alpha), dropout=float(dropout))


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The LoRA tensors of a file, keyed as `lora_state_dict`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    # TypeError and RuntimeError: shapes that safetensors lets pass and torch cannot make.
    except (SafetensorError, OSError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{file} is not a whole safetensors file ({explain(error)}); save the adapter again."
        ) from error
    foreign = [k for k in state if not (k.startswith(PREFIX) and k.endswith((".lora_A.weight", ".lora_B.weight")))]
    foreign += [key for key in state if not key.isprintable()]
    if foreign or not state:
        named = f"{_show(foreign[0])} among {len(state)} tensors" if foreign else "nothing"
        raise InputError(f"{file} holds {named}, not LoRA tensors in PEFT's names; use plain LoRA.")
    for key, tensor in state.items():
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{file} holds {key} in {dtype}; save it in float32, bfloat16 or float16.")
    return {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}


def _show(value: Any) -> str:
    """A value out of a file, on one line and not too long."""
    return value[:60] if isinstance(value, str) and value.isprintable() else reprlib.repr(value)[:60]


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
    elif any(layer.rank != config.rank for layer in layers.values()):
        own = next(layer.rank for layer in layers.values())
        raise InputError(f"The adapter in {directory} has rank {config.rank}, the model's {own}; they must agree.")
    load_lora_state_dict(model, state, origin=str(directory))
    for layer in lora_layers(model).values():
        layer.alpha, layer.dropout = config.alpha, config.dropout
    freeze_base(model)
    targets = description.get("target_modules")
    config.target_modules = ",".join(targets) if isinstance(targets, list) and targets else config.target_modules
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
        rest = [f"and {len(problems) - NUM_LISTED} more"] if len(problems) > NUM_LISTED else []
        listed = "; ".join([*problems[:NUM_LISTED], *rest])
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
