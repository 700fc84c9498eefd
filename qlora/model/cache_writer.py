"""Write the quantized base to disk as a bitsandbytes checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.model.hf_config import CALIBRATION
from qlora.model.shards import layout_of, stored_parts, write_shards
from qlora.model.skeleton import EmptySource, Source
from qlora.model.weights import stored_weights
from qlora.quant.storage import quantization_config
from qlora.quant.weight import QuantConfig


def write_cache(
    network: Any,
    source: Source,
    quant: QuantConfig,
    device: torch.device,
    target: Path,
    codes: Mapping[str, Tensor] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Write a quantized model as a bitsandbytes checkpoint that transformers could load too.

    Args:
        network: an `empty_model`.
        source: of its weights, which are read, quantized on `device` and written one at a time.
        target: an empty directory.
        codes: 4-bit weights by name, in the place of those of `source`; `calibration`: how they were chosen.
    """
    own = codes or {}
    planned = stored_weights(network, EmptySource(network), quant, torch.device("meta"))
    layout = {name: layout_of(stored_parts(name, weight)) for name, weight in planned}
    weights = ((name, own.get(name, weight)) for name, weight in stored_weights(network, source, quant, device))
    write_shards(target, layout, lambda wanted: ((name, stored_parts(name, weight)) for name, weight in weights))
    description = network.config.to_dict()
    description["quantization_config"] = quantization_config(quant)
    if calibration is not None:
        description[CALIBRATION] = dict(calibration)
    (target / "config.json").write_text(json.dumps(description, indent=2, default=str))
