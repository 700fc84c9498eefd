"""A base in 4 bits as a model directory of its own: bitsandbytes' layout, which transformers and PEFT load."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.export.merged_weights import network_quantization
from qlora.export.metadata import change_json, write_base_metadata
from qlora.export.model_card import make_quantized_card
from qlora.lora.full_parameters import named_base_parameters
from qlora.model.cache import cached_base
from qlora.model.calibrate import Calibration
from qlora.model.hf_config import CALIBRATION
from qlora.model.load import load_base_model
from qlora.model.resolve import resolve_model
from qlora.model.safetensors_source import saved_name
from qlora.model.shards import Parts, layout_of, stored_parts, write_shards
from qlora.model.weights import is_stored_in_4bit
from qlora.quant.library import Params4bit
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.files import new_directory, read_json


def save_quantized(model: str, quant: QuantConfig, output_dir: str) -> None:
    """Write a base as `quant` says, with its tokenizer and configs, into a new directory.

    Args:
        model: directory, hub id or .gguf file with 16-bit weights.
        quant: with a calibration, which is in the cache (`calibrate_base`), or with the nearest codes.
    Raises:
        InputError: the directory exists, or the model is stored in 4 bits.
    """
    target = Path(output_dir)
    if target.exists():
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    if is_stored_in_4bit(model):
        raise InputError(f"--model {model} is stored in 4 bits already; pass the original model.")
    network = load_base_model(model, True, quant)  # it is then in the cache
    config = read_json(cached_base(resolve_model(model), quant) / "config.json", "empty the cache")
    known = {CALIBRATION: config[CALIBRATION]} if CALIBRATION in config else {}
    found = Calibration(**known[CALIBRATION]) if known else None
    with new_directory(target) as staging:
        _write_weights(network, staging)
        write_base_metadata(model, network_quantization(network, quant), staging)
        change_json(staging / "config.json", lambda written: written | known)
        (staging / "README.md").write_text(make_quantized_card(model, quant, found), encoding="utf-8")


def _write_weights(network: Any, directory: Path) -> None:
    """Codes as they are, all else in bf16: transformers computes in the dtype that a checkpoint's weights have."""
    kind = network.config.model_type
    parameters = {
        saved_name(name, kind): p.detach() if p.is_floating_point() else p
        for name, p in named_base_parameters(network)
    }

    def parts(name: str) -> Parts:
        weight: Tensor = parameters[name]
        return stored_parts(name, weight if isinstance(weight, Params4bit) else weight.to(torch.bfloat16))

    def tensors(wanted: Collection[str]) -> Iterator[tuple[str, Parts]]:
        return ((name, parts(name)) for name in parameters if name in wanted)

    write_shards(directory, {name: layout_of(parts(name)) for name in parameters}, tensors)
