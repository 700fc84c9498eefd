"""Write safetensors shards as tensors arrive, with at most one weight in memory.

The safetensors library needs all tensors of a file in memory; the format itself is a length, a JSON header of
dtypes, shapes and offsets, and the bytes (github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.quant.library import Params4bit
from qlora.quant.storage import packed_tensors
from qlora.system.files import new_file

SHARD_BYTES = 5 * 10**9  # of a file, unless the caller says otherwise
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
Parts = dict[str, Tensor]  # what one weight is stored as: key in the file -> tensor
Layout = Mapping[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]  # weight -> key -> (dtype, shape)


def stored_parts(name: str, weight: Tensor) -> Parts:
    """The tensors that store a weight: codes and scales of a 4-bit one, otherwise the weight itself."""
    parts = packed_tensors(weight) if isinstance(weight, Params4bit) else {"": weight}
    return {f"{name}{part}": tensor for part, tensor in parts.items()}


def layout_of(parts: Parts) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes for a file's header, before the weight is written; also from meta tensors."""
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in parts.items()}


def plan_shards(layout: Layout, max_bytes: int) -> dict[str, list[str]]:
    """File name -> weights in it, in order; a file holds at most `max_bytes` of tensors, or a single weight."""
    from huggingface_hub import split_state_dict_into_shards_factory

    # Clip a weight above the limit to the limit: it then closes the file before it, which the library would
    # otherwise keep filling.
    sizes = {name: min(max_bytes, sum(map(_num_bytes, parts.values()))) for name, parts in layout.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    return plan.filename_to_tensors


def write_shards(
    directory: Path,
    layout: Layout,
    weights: Callable[[Collection[str]], Iterator[tuple[str, Parts]]],
    max_bytes: int | None = None,
    finished: Collection[str] = (),
    note: Callable[[Path], object] = lambda file: None,
) -> None:
    """Write model.safetensors, or several files and their index.

    Args:
        layout: every weight, in the order that `weights` yields them.
        weights: called once, with the names of the weights to yield.
        max_bytes: largest file; by default SHARD_BYTES.
        finished: files that exist already and are kept.
        note: called with each file when it is complete.
    """
    plan = plan_shards(layout, SHARD_BYTES if max_bytes is None else max_bytes)
    waiting = {file: names for file, names in plan.items() if file not in finished}
    tensors = weights({name for names in waiting.values() for name in names})
    for file, names in waiting.items():
        with new_file(directory / file) as staging:
            _write_file(staging, {name: layout[name] for name in names}, tensors)
        note(directory / file)
    if len(plan) > 1:
        total = sum(_num_bytes(part) for parts in layout.values() for part in parts.values())
        weight_map = {key: file for file, names in plan.items() for name in names for key in layout[name]}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, layout: Layout, weights: Iterator[tuple[str, Parts]]) -> None:
    """Write the next of `weights`, as listed in `layout`.

    Wide dtypes come first, so that each tensor starts at a multiple of its item size.
    """
    parts = [item for stored in layout.values() for item in stored.items()]
    parts.sort(key=lambda item: -item[1][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in parts:
        start, end = end, end + _num_bytes((dtype, shape))
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for expected, (name, tensors) in zip(layout, weights, strict=False):
            assert name == expected and layout_of(tensors) == layout[name]
            for key, tensor in tensors.items():
                handle.seek(8 + len(text) + header[key]["data_offsets"][0])
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                handle.write(content.numpy().data)


def _num_bytes(part: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = part
    return dtype.itemsize * math.prod(shape)
