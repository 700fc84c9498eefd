"""Write safetensors shards while the tensors are still coming in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from qlora.quant.library import Params4bit
from qlora.quant.storage import packed_tensors

SHARD_BYTES = 128 * 2**20  # of the cache; what waits in memory to be written


def write_shards(directory: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or shards and their index; the tensor that brings a shard to SHARD_BYTES is its last."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []  # names of the tensors in each
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        save_file(waiting, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, weight in weights:
        parts = packed_tensors(weight) if isinstance(weight, Params4bit) else {"": weight}
        waiting.update({f"{name}{part}": tensor.contiguous().cpu() for part, tensor in parts.items()})
        del weight, parts  # else they are held while the next one is read
        if sum(tensor.nbytes for tensor in waiting.values()) >= SHARD_BYTES:
            write()
    if waiting:
        write()
    if len(shards) == 1:
        os.rename(directory / "0.safetensors", directory / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / f"{number}.safetensors", directory / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
