"""Read adapters of other tools into PEFT's names and shapes.

They compute the same as PEFT, y = W x + s B A x (DoRA: each row of W + s B A scaled to length m), but store it
differently. LitGPT, Megatron and minimind are in fused_formats.py; the others here. I inputs, O outputs, R rank:

    PEFT        <layer>.lora_A.weight (R, I)   .lora_B.weight (O, R)   .lora_magnitude_vector (O,)   s = alpha / R
    MLX-LM      <layer>.lora_a (I, R)          .lora_b (R, O)          .m (O,)                       s as "scale"
    torchtune   .lora_a.weight (R, I)          .lora_b.weight (O, R)   .magnitude (O,)               s = alpha / R

MLX-LM names layers as Hugging Face does. torchtune has its own names, and if its rotary embedding rotates
adjacent outputs of a head (2i, 2i + 1) instead of Hugging Face's (i, i + half), q's and k's rows are in that
order in B and m. Pickles (.pt, .pth) are never loaded; the error says how to convert them.

Formats: MLX-LM 0.32, mlx_lm/tuner/{lora,dora,trainer}.py; torchtune 0.6.1, modules/peft/{lora,dora}.py and
models/convert_weights.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora.adapters.fused_formats import (
    LITGPT_KEY,
    LITGPT_PARTS,
    MAGNITUDE,
    MEGATRON_KEY,
    MINIMIND_KEY,
    QKV,
    A,
    B,
    Layers,
    common_rank,
    split_litgpt,
    split_megatron,
    split_minimind,
)
from qlora.model.attention import head_counts
from qlora.model.families import FAMILIES, family_of
from qlora.model.rotary import to_halves
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import read_json, read_tensors
from qlora.system.redact import redact
from qlora.system.wording import explain, list_first, quote

MLX_WEIGHTS, LITGPT_SETTINGS = "adapters.safetensors", "hyperparameters.yaml"
MAX_SCALE = 1e30  # values near it overflow
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
Tool = Literal["MLX-LM", "torchtune", "LitGPT", "Megatron", "minimind"]
KEYS: dict[Tool, re.Pattern[str]] = {
    "torchtune": TORCHTUNE_KEY,
    "LitGPT": LITGPT_KEY,
    "Megatron": MEGATRON_KEY,
    "minimind": MINIMIND_KEY,
}


def detect_tool(path: str | Path) -> Tool | None:
    """The tool whose own format a directory or file holds; None for PEFT's and anything else.

    Some files have the same name as PEFT's; their tensor names differ.
    """
    file = _tensor_file(Path(path))
    try:
        if file is None or file.suffix != ".safetensors":
            return None if file is None else _tool_of_pickle(file)
        return "MLX-LM" if file.name == MLX_WEIGHTS else _tool_of(file)
    except (OSError, SafetensorError):
        return None


def _tensor_file(path: Path) -> Path | None:
    """The file with an adapter's tensors: `path`, or the one in this directory."""
    try:
        if path.is_file():
            return path
        for name in (MLX_WEIGHTS, WEIGHTS):
            if (path / name).is_file():
                return path / name
        tensors = [file for file in path.glob("*.safetensors") if file.is_file()]  # not a pipe, which would wait
        pickles = [file for kind in ("adapter_*.pt", "*.pth", "*.pth.lora") for file in path.glob(kind)]
    except OSError:
        return None
    found = tensors or pickles
    return found[0] if len(found) == 1 else None


def _tool_of(file: Path) -> Tool | None:
    """The tool that names its tensors as this safetensors file does."""
    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
    return next((tool for tool, pattern in KEYS.items() if any(map(pattern.fullmatch, keys))), None)


def _tool_of_pickle(file: Path) -> Tool | None:
    """The tool that gives its pickles such a name."""
    if file.name.endswith(".pth.lora"):
        return "LitGPT"
    return {".pt": "torchtune", ".pth": "minimind"}.get(file.suffix)  # type: ignore[return-value]


def read_foreign_adapter(
    path: str | Path, base_model: str | None = None, model_config: Any = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter that another tool has written in a format of its own.

    Args:
        path: directory or tensor file.
        base_model: name or path of the base to record; by default the one that the adapter names.
        model_config: transformers config of the base, which every format but MLX-LM's and minimind's needs.
    Returns:
        (state, description): finite tensors in PEFT's names without its prefix, and PEFT's adapter_config.json.
    Raises:
        InputError: no such adapter, damaged, or not expressible in PEFT's format.
    """
    path = Path(path)
    tool, file = detect_tool(path), _tensor_file(path)
    if tool is None or file is None:
        raise InputError(
            f"{path} holds no adapter of {', '.join(READERS)} by its tensors' names; check the path, and give one "
            "in PEFT's format to --adapter as it is."
        )
    if file.suffix != ".safetensors":
        raise InputError(
            f"{file} is a pickle, which can run code and is never loaded here. If you trust it, convert it with "
            "torch's weights-only loader, which makes nothing but tensors, in a Python of its own, and import the "
            f"result: import torch, safetensors.torch as s; t = torch.load({str(file)!r}, weights_only=True); "
            "s.save_file({k: v.clone() for k, v in t.get('model', t).items()}, "
            f"{str(file.parent / WEIGHTS)!r})"
        )
    if tool not in ("MLX-LM", "minimind") and model_config is None:
        raise InputError(f"{path} holds a {tool} adapter, whose layout depends on its base; pass --model.")
    layers, rank, alpha, dropout, named = READERS[tool](file, model_config)
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


# Each reader: (tensor file, transformers config of the base) -> (layers, rank, alpha, dropout, name of the base).
Read = tuple[Layers, int, float, float, Any]


def _settings(file: Path, fields: str) -> dict[str, Any]:
    """The adapter_config.json next to a tensor file."""
    if not (file.parent / CONFIG).is_file():
        raise InputError(f"{file.parent} has no {CONFIG}; put it next to the tensors, with {fields}.")
    return read_json(file.parent / CONFIG, "save the adapter again", unique_keys=True)


def _read_mlx(file: Path, model_config: Any) -> Read:
    directory, description = file.parent, _settings(file, "the run's settings")
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
    for key, tensor in _read_tensors(file).items():
        layer, _, part = key.rpartition(".")
        if part not in MLX_PARTS or not layer or layer.rpartition(".")[2] in MLX_EMBEDDINGS:
            unknown.append(key)
        else:
            matrix = tensor.T.contiguous() if tensor.dim() == 2 else tensor
            layers.setdefault(layer, {})[MLX_PARTS[part]] = matrix
    _check(file, layers, unknown, rank, dora=kind == "dora")
    return layers, rank, scale * rank, float(dropout), description.get("model")


def _read_torchtune(file: Path, model_config: Any) -> Read:
    """The dropout is not stored."""
    directory, description = file.parent, _settings(file, '"r" and "lora_alpha"')
    family = family_of(model_config)
    if family.torchtune_rotary is None:
        known = ", ".join(kind for kind, other in FAMILIES.items() if other.torchtune_rotary)
        raise InputError(f"--model is a {family.model_type} model; torchtune adapters of {known} can be imported.")
    rank = _rank(directory / CONFIG, description, "r")
    alpha = _scale(directory / CONFIG, description, "lora_alpha")
    layers: Layers = {}
    unknown = []
    for key, tensor in _read_tensors(file).items():
        match = TORCHTUNE_KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        layer = f"model.layers.{int(match['index'])}.{TORCHTUNE_LAYERS[match['module']]}"
        layers.setdefault(layer, {})[TORCHTUNE_PARTS[match["part"]]] = tensor
    dora = any(MAGNITUDE in parts for parts in layers.values())
    _check(file, layers, unknown, rank, dora)
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


def _read_minimind(file: Path, model_config: Any) -> Read:
    """Nothing but the tensors is stored; B A is added as it is."""
    layers, unknown = split_minimind(_read_tensors(file))
    rank = common_rank(layers)
    _check(file, layers, unknown, rank, dora=False)
    return layers, rank, float(rank), 0.0, None


def _read_litgpt(file: Path, model_config: Any) -> Read:
    import yaml

    settings_file = file.parent / LITGPT_SETTINGS
    try:
        settings = yaml.safe_load(settings_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{settings_file} cannot be read ({explain(error)}); put LitGPT's next to the tensors, which come "
            "without rank and alpha."
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"{settings_file} holds no settings; put LitGPT's next to the tensors.")
    rank, alpha = _rank(settings_file, settings, "lora_r"), _scale(settings_file, settings, "lora_alpha")
    share = "a number from 0 up to, not including, 1"
    dropout = _setting(
        settings_file, {"lora_dropout": 0.0, **settings}, "lora_dropout", share, lambda n: 0 <= n < 1
    )
    parts = [name for name, flag in zip(QKV, LITGPT_PARTS, strict=True) if settings.get(flag) is True]
    layers, unknown = split_litgpt(_read_tensors(file), model_config, rank, parts)
    _check(file, layers, unknown, rank, dora=False)
    return layers, rank, alpha, float(dropout), settings.get("checkpoint_dir")


def _read_megatron(file: Path, model_config: Any) -> Read:
    settings = _settings(file, '"r" and "lora_alpha" (dim and alpha of the run)')
    rank, alpha = _rank(file.parent / CONFIG, settings, "r"), _scale(file.parent / CONFIG, settings, "lora_alpha")
    layers, unknown = split_megatron(_read_tensors(file), model_config)
    _check(file, layers, unknown, rank, dora=False)
    return layers, rank, alpha, 0.0, settings.get("base_model_name_or_path")


READERS: dict[Tool, Callable[[Path, Any], Read]] = {
    "MLX-LM": _read_mlx,
    "torchtune": _read_torchtune,
    "LitGPT": _read_litgpt,
    "Megatron": _read_megatron,
    "minimind": _read_minimind,
}


def _unpermute(rows: Tensor, layer: str, config: Any) -> Tensor:
    """Put the rows (O, ...) of q or k from adjacent rows (2i, 2i + 1) into Hugging Face's halves (i, i + half)."""
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
    problems = [f"{key} is not a LoRA tensor of a block's linear layer" for key in unknown]
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
