"""The quantized base on disk, as a bitsandbytes checkpoint that is memory-mapped at the next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora.model.fingerprint import fingerprint_files
from qlora.model.resolve import open_source, resolve_model
from qlora.model.safetensors_source import SafetensorsSource, weight_files
from qlora.model.shards import layout_of, stored_parts, write_shards
from qlora.model.skeleton import EmptySource, Source
from qlora.model.weights import stored_weights
from qlora.quant.storage import quantization_config
from qlora.quant.weight import QuantConfig
from qlora.system.cache import cache_directory
from qlora.system.digests import is_whole


def write_cache(network: Any, source: Source, quant: QuantConfig, device: torch.device, target: Path) -> None:
    """Write a quantized model as a bitsandbytes checkpoint that transformers could load too.

    Args:
        network: an `empty_model`.
        source: of its weights, which are read, quantized on `device` and written one at a time.
        target: an empty directory.
    """
    planned = stored_weights(network, EmptySource(network), quant, torch.device("meta"))
    layout = {name: layout_of(stored_parts(name, weight)) for name, weight in planned}
    weights = stored_weights(network, source, quant, device)
    write_shards(target, layout, lambda wanted: ((name, stored_parts(name, w)) for name, w in weights))
    description = network.config.to_dict()
    description["quantization_config"] = quantization_config(quant)
    (target / "config.json").write_text(json.dumps(description, indent=2, default=str))


def cached_base(path: Path, quant: QuantConfig) -> Path:
    """Where the quantized form of a model's files is kept."""
    return cache_directory() / f"base-{fingerprint_files(weight_files(path), quant)}"


def open_cache(cached: Path) -> SafetensorsSource:
    """The weights in a directory of the cache that has been verified (`is_whole`, `build_verified`)."""
    return SafetensorsSource(cached, map_files=True, remedy="delete this cache and it is made again")


def find_source(model: str, quant: QuantConfig | None, cache: bool = True) -> Source:
    """A model's weights: the quantized ones in the cache if present, else its own files. Writes nothing.

    Args:
        quant: how the base is quantized; None for a 16-bit one.
    """
    path = resolve_model(model)
    cached = cached_base(path, quant) if quant is not None and cache else None
    return open_cache(cached) if cached is not None and is_whole(cached) else open_source(path)
