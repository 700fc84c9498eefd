"""Read adapters of MLX-LM and torchtune into PEFT's names and shapes.

Both compute the same as PEFT, y = W x + s B A x (DoRA: each row of W + s B A scaled to length m), but store it
differently. I inputs, O outputs, R rank:

    PEFT        <layer>.lora_A.weight (R, I)   .lora_B.weight (O, R)   .lora_magnitude_vector (O,)   s = alpha / R
    MLX-LM      <layer>.lora_a (I, R)          .lora_b (R, O)          .m (O,)                       s as "scale"
    torchtune   .lora_a.weight (R, I)          .lora_b.weight (O, R)   .magnitude (O,)               s = alpha / R

MLX-LM names layers as Hugging Face does. torchtune has its own names, and if its rotary embedding rotates
neighboring outputs of a head (2i, 2i + 1) instead of Hugging Face's (i, i + half), q's and k's rows are in that
order in B and m. Its own format is a pickle, which is never loaded.

Formats: MLX-LM 0.32, mlx_lm/tuner/{lora,dora,trainer}.py; torchtune 0.6.1, modules/peft/{lora,dora}.py and
models/convert_weights.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.model.attention import head_counts
from qlora.model.families import FAMILIES, family_of
from qlora.model.rotary import to_halves
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import read_json, read_tensors
from qlora.system.redact import redact
from qlora.system.wording import list_first, quote

MLX_WEIGHTS = "adapters.safetensors"
MAX_SCALE = 1e30  # values near it overflow
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
MLX_PARTS = {"lora_a": A, "lora_b": B, "m": MAGNITUDE}
MLX_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")  # shaped like linear layers, but transposed
TORCHTUNE_PARTS = {"lora_a.weight": A, "lora_b.weight": B, "magnitude": MAGNITUDE}
TORCHTUNE_LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
TORCHTUNE_KEY = re.compile(
    rf"layers\.(?P<index>0|[1-9][0-9]{{0,5}})\.(?P<module>{'|'.join(TORCHTUNE_LAYERS)})"
    rf"\.(?P<part>{'|'.join(TORCHTUNE_PARTS)})"
)
Tool = Literal["MLX-LM", "torchtune"]
Layers = dict[str, dict[str, Tensor]]  # layer -> A, B, MAGNITUDE -> tensor


def recognise(directory: str | Path) -> Tool | None:
    """The tool whose own format a directory holds; None for PEFT's and anything else.

    torchtune's file has the same name as PEFT's; its tensor names differ.
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    try:
        if (directory / MLX_WEIGHTS).is_file():
            return "MLX-LM"
        if (directory / WEIGHTS).is_file():
            with safe_open(directory / WEIGHTS, framework="pt") as file:
                return "torchtune" if any(map(TORCHTUNE_KEY.fullmatch, file.keys())) else None
        return "torchtune" if any(directory.glob("adapter_*.pt")) else None
    except (OSError, SafetensorError):
        return None


def read_foreign_adapter(
    directory: str | Path, base_model: str | None = None, model_config: Any = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter that MLX-LM or torchtune has written.

    Args:
        base_model: name or path of the base to record; by default the one that the adapter names.
        model_config: transformers config of the base, which torchtune's formats need.
    Returns:
        (state, description): finite tensors in PEFT's names without its prefix, and PEFT's adapter_config.json.
    Raises:
        InputError: neither tool's adapter, damaged, or not expressible in PEFT's format.
    """
    directory = Path(directory)
    tool = recognise(directory)
    if tool is None:
        raise InputError(
            f"{directory} holds no adapter of MLX-LM ({MLX_WEIGHTS}) or torchtune (layers.0.attn... in "
            f"{WEIGHTS}); check the path, and give one in PEFT's format to --adapter as it is."
        )
    if tool == "torchtune" and not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory} has only torchtune's pickle (.pt), which can run code and is never loaded; if you "
            f"trust it, write torch.load(FILE, weights_only=True) to {WEIGHTS} by safetensors."
        )
    if not (directory / CONFIG).is_file():
        fields = '"r" and "lora_alpha"' if tool == "torchtune" else "the run's settings"
        raise InputError(f"{directory} has no {CONFIG}; put it beside the tensors, with {fields}.")
    description = read_json(directory / CONFIG, "save the adapter again", unique_keys=True)
    read = _read_mlx if tool == "MLX-LM" else _read_torchtune
    layers, rank, alpha, dropout, named = read(directory, description, model_config)
    name = base_model if base_model is not None else named
    state = {f"{layer}.{part}": tensor for layer, parts in layers.items() for part, tensor in parts.items()}
    return state, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": redact(name) if isinstance(name, str) else None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(MAGNITUDE in parts for parts in layers.values()),
        "inference_mode": True,
    }


def _read_mlx(
    directory: Path, description: dict[str, Any], model_config: Any
) -> tuple[Layers, int, float, float, Any]:
    """(layers, rank, alpha, dropout, base) of an MLX-LM adapter; `model_config` is unused."""
    kind = description.get("fine_tune_type", "lora")
    if kind == "full":
        raise InputError(f"{directory} holds a full fine-tune, not an adapter; use it as a model of its own.")
    settings = description.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(settings, dict):
        raise InputError(
            f"{directory / CONFIG} has fine_tune_type = {quote(kind)} and lora_parameters = {quote(settings)}; "
            "they should be lora or dora and its settings: save the adapter again."
        )
    rank = _rank(directory / CONFIG, settings, "rank")
    scale = _scale(directory / CONFIG, settings, "scale")
    share = "a number from 0 up to, not including, 1"
    dropout = _setting(directory / CONFIG, {"dropout": 0.0, **settings}, "dropout", share, lambda n: 0 <= n < 1)
    layers: Layers = {}
    unknown = []
    for key, tensor in _read_tensors(directory / MLX_WEIGHTS).items():
        layer, _, part = key.rpartition(".")
        if part not in MLX_PARTS or not layer or layer.rpartition(".")[2] in MLX_EMBEDDINGS:
            unknown.append(key)
        else:
            matrix = tensor.T.contiguous() if tensor.dim() == 2 else tensor
            layers.setdefault(layer, {})[MLX_PARTS[part]] = matrix
    _check(directory / MLX_WEIGHTS, layers, unknown, rank, dora=kind == "dora")
    return layers, rank, scale * rank, float(dropout), description.get("model")


def _read_torchtune(
    directory: Path, description: dict[str, Any], model_config: Any
) -> tuple[Layers, int, float, float, Any]:
    """(layers, rank, alpha, dropout, base) of a torchtune adapter; the dropout is not stored."""
    if model_config is None:
        raise InputError(f"{directory} holds a torchtune adapter, whose layout depends on its base; pass --model.")
    family = family_of(model_config)
    if family.torchtune_rotary is None:
        known = ", ".join(kind for kind, other in FAMILIES.items() if other.torchtune_rotary)
        raise InputError(f"--model is a {family.model_type} model; torchtune adapters of {known} can be imported.")
    rank = _rank(directory / CONFIG, description, "r")
    alpha = _scale(directory / CONFIG, description, "lora_alpha")
    layers: Layers = {}
    unknown = []
    for key, tensor in _read_tensors(directory / WEIGHTS).items():
        match = TORCHTUNE_KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        layer = f"model.layers.{int(match['index'])}.{TORCHTUNE_LAYERS[match['module']]}"
        layers.setdefault(layer, {})[TORCHTUNE_PARTS[match["part"]]] = tensor
    dora = any(MAGNITUDE in parts for parts in layers.values())
    _check(directory / WEIGHTS, layers, unknown, rank, dora)
    for layer, parts in layers.items():
        module = layer.rpartition(".")[2]
        has_bias = family.qkv_bias or getattr(model_config, "attention_bias", False)
        if dora and has_bias and module in ("q_proj", "k_proj", "v_proj"):
            raise InputError(
                f"{directory} holds DoRA on {layer}, which has a bias: torchtune scales that too, PEFT's format "
                "cannot say so; use the merged model that torchtune wrote."
            )
        if module in ("q_proj", "k_proj") and family.torchtune_rotary == "interleaved":
            for part in parts.keys() - {A}:
                parts[part] = _unpermute(parts[part], layer, model_config)
    return layers, rank, alpha, 0.0, description.get("base_model_name_or_path")


def _unpermute(rows: Tensor, layer: str, config: Any) -> Tensor:
    """Put the rows (O, ...) of q or k from neighbors (2i, 2i + 1) into Hugging Face's halves (i, i + half)."""
    heads, kv_heads, head_dim = head_counts(config)
    if layer.endswith(".k_proj"):
        heads = kv_heads
    if rows.shape[0] != heads * head_dim or head_dim % 2:
        raise InputError(
            f"The adapter has {rows.shape[0]} rows for {layer}, but --model {heads} heads of {head_dim} there; "
            "pass the base that the adapter was trained on."
        )
    return to_halves(rows, heads)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, named printably."""
    state = read_tensors(file, "save the adapter again")
    strange = [key for key in state if not key.isprintable()]
    if strange:
        raise InputError(f"{file} holds a tensor named {quote(strange[0])}; the file is not to be trusted.")
    return state


def _check(file: Path, layers: Layers, unknown: list[str], rank: int, dora: bool) -> None:
    """Check that every layer has finite A (R, I) and B (O, R) and, with DoRA, magnitude (O,).

    Raises:
        InputError: lists every tensor that does not fit.
    """
    problems = [f"{key} is no LoRA tensor of a linear layer in a block" for key in unknown]
    problems += [] if layers or unknown else ["nothing"]
    for layer, parts in layers.items():
        missing = [part for part in (A, B, *([MAGNITUDE] if dora else [])) if part not in parts]
        problems += [f"{layer} lacks its {part.removesuffix('.weight')}" for part in missing]
        if not dora and MAGNITUDE in parts:
            problems.append(f"{layer} has a magnitude, as only DoRA does")
        outputs = parts[B].shape[0] if B in parts and parts[B].dim() else 0
        for part, tensor in parts.items():
            name, shape = f"{layer}.{part}", tuple(tensor.shape)
            wanted = {A: (rank, *shape[1:2]), B: (outputs, rank), MAGNITUDE: (outputs,)}[part]
            if tensor.dim() != (1 if part == MAGNITUDE else 2) or not tensor.numel():
                problems.append(f"{name} has the shape {shape}, which a linear layer's cannot have")
            elif shape != wanted and not (part == MAGNITUDE and B in missing):
                problems.append(f"{name} has the shape {shape}, not {wanted}")
            elif tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, no 16- or 32-bit float")
            elif not torch.isfinite(tensor).all():
                problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise InputError(f"{file} does not hold a LoRA adapter of rank {rank}: {list_first(problems)}.")


def _setting(file: Path, settings: dict[str, Any], name: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
    """A number from a file's settings."""
    value = settings.get(name)
    if type(value) not in (int, float) or not fits(value):
        has = quote(value) if name in settings else "no value"
        raise InputError(f"{file} has {name} = {has}, not {wanted}; save the adapter again.")
    return value


def _rank(file: Path, settings: dict[str, Any], name: str) -> int:
    return _setting(file, settings, name, "a whole number of 1 or more", lambda n: type(n) is int and n >= 1)


def _scale(file: Path, settings: dict[str, Any], name: str) -> float:
    return float(_setting(file, settings, name, "a number above 0", lambda n: 0 < n < MAX_SCALE))
