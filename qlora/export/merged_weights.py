"""Write merged weights as safetensors shards, dense (16 bits) or packed (4 bits); an interrupted merge goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.export.mixture import Mixture
from qlora.lora.full_parameters import named_base_parameters, vocabulary_names
from qlora.lora.targets import linear_layers
from qlora.model.base import base_info
from qlora.model.load import load_base_model
from qlora.model.safetensors_source import module_name, saved_name
from qlora.model.weights import dequantized_weights
from qlora.quant.gptq import input_moments, requantize
from qlora.quant.library import Params4bit
from qlora.quant.storage import packed_tensors
from qlora.quant.weight import dequantize_weight
from qlora.system.files import new_file, read_json, sha256_of

GB = 10**9
STATE_BYTES = 512  # of the state of a 4-bit weight, in a file
SHARDS = "shards.json"  # in the staging directory: checksum of each finished file
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
Layout = dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]


class DenseWriter:
    """Merged weights in bf16, read, merged and dropped one at a time."""

    quantization_config: dict[str, Any] | None = None

    def __init__(self, model: str, mixture: Mixture, original: bool, network: Any) -> None:
        self.model, self.mixture, self.original = model, mixture, original
        self.shapes = mixture.merged_shapes(network)
        self.layout: Layout = {name: {name: (torch.bfloat16, shape)} for name, shape in self.shapes.items()}
        layers = linear_layers(network).items()
        self.transposed = {f"{name}.weight" for name, layer in layers if not isinstance(layer, nn.Linear)}
        self.embedding = vocabulary_names(network)[0]

    def tensors(self, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {name: tensor}) of the wanted parameters, in the order of `layout`."""
        shift = self.mixture.adapters[0].base_shift
        head = next((name for name in reversed(self.shapes) if name in self.mixture.untied), None)
        for name, weight in dequantized_weights(self.model, self.mixture.quantization, self.original, shift):
            if name == self.embedding and head is not None:
                tied = weight
            if name not in wanted:
                continue
            own = module_name(name)  # a Mixtral router's in this project, by which an adapter knows it
            if name in self.transposed:  # Conv1D
                weight = self.mixture.merge_into(own, weight.T).T
            else:
                weight = self.mixture.merge_into(own, weight)
            yield name, {name: weight.to(torch.bfloat16)}
        if head is not None and head in wanted:
            yield head, {head: self.mixture.merge_into(head, tied).to(torch.bfloat16)}


class PackedWriter:
    """Merged weights in the layout of a bitsandbytes checkpoint: those the adapters change get new codes."""

    def __init__(self, model: str, mixture: Mixture, texts: list[list[int]], network: Any) -> None:
        self.shapes = shapes = mixture.merged_shapes(network)
        self.network = load_base_model(model, True, mixture.quantization, compute_dtype="float32")
        own, kind = base_info(self.network).quantization, self.network.config.model_type
        assert own is not None
        linears = [(n, m) for n, m in self.network.named_modules() if isinstance(m, nn.Linear)]
        self.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": own.quant_type,
            "bnb_4bit_use_double_quant": own.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": [n for n, m in linears if not isinstance(m.weight, Params4bit)],
        }
        mixture.load_onto(self.network)
        parameters = {
            saved_name(name, kind): p.detach() if p.is_floating_point() else p
            for name, p in named_base_parameters(self.network)
        }
        self.parameters = {name: parameters[name] for name in shapes}
        self.mixture, self.texts = mixture, texts
        self.layout: Layout = {}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Params4bit):
                parts = _stored_parts(name, parameter).items()
                self.layout[name] = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in parts}
            else:
                self.layout[name] = {name: (torch.bfloat16, shapes[name])}

    def tensors(self, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, its stored parts) of the wanted parameters, in the order of `layout`."""
        adapted = {f"{layer}.weight" for saved in self.mixture.adapters for layer in saved.adapted_layers}
        packed = [n for n in self.parameters if n in adapted and isinstance(self.parameters[n], Params4bit)]
        layers = [name.removesuffix(".weight") for name in packed if name in wanted]
        moments = input_moments(self.network, layers, self.texts)
        for name, parameter in self.parameters.items():
            if name not in wanted:
                continue
            if not isinstance(parameter, Params4bit):
                yield name, {name: self.mixture.merge_into(name, parameter.float()).to(torch.bfloat16)}
                continue
            if name in adapted:
                layer, moment = next(moments)
                assert f"{layer}.weight" == name
                merged = self.mixture.merge_into(name, dequantize_weight(parameter, torch.float32))
                parameter = requantize(merged, parameter, moment)
            yield name, _stored_parts(name, parameter)


def _stored_parts(name: str, weight: Params4bit) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight under their names, of sizes that do not depend on its values.

    Its state is JSON with a number in it, whose digits vary; spaces bring it to one length.
    """
    parts = {f"{name}{part}": tensor for part, tensor in packed_tensors(weight).items()}
    (state,) = (key for key in parts if ".quant_state." in key)
    parts[state] = F.pad(parts[state], (0, STATE_BYTES - len(parts[state])), value=ord(" "))
    return parts


def write_merged_shards(
    writer: DenseWriter | PackedWriter, directory: Path, max_shard_size: int, say: Callable[[str], Any]
) -> None:
    """Write all tensors into safetensors files of at most `max_shard_size` bytes, and the index.

    Files that are there already, whole by their checksums, are left as they are.
    """
    shards: list[Layout] = [{}]
    size = total = 0
    for name, parts in writer.layout.items():
        own = sum(map(_num_bytes, parts.values()))
        if shards[-1] and size + own > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = parts
        size, total = size + own, total + own
    several = len(shards) > 1
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    finished = _finished_shards(directory)
    waiting = {file: shard for file, shard in zip(files, shards, strict=True) if file not in finished}
    if finished:
        say(f"going on with a merge that was stopped: {len(finished)} of {len(files)} files are there")
    weights = writer.tensors({name for shard in waiting.values() for name in shard})
    for file, shard in waiting.items():
        with new_file(directory / file) as staging:
            _write_safetensors(staging, shard, weights)
        finished[file] = sha256_of(directory / file)
        with new_file(directory / SHARDS) as staging:
            staging.write_text(json.dumps(finished))
    if several:
        weight_map = {
            key: file for file, shard in zip(files, shards, strict=True) for p in shard.values() for key in p
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _finished_shards(directory: Path) -> dict[str, str]:
    """Checksums of the files that an earlier try has finished and that are still what they were."""
    if not (directory / SHARDS).is_file():
        return {}
    noted = read_json(directory / SHARDS, f"delete {directory}")
    return {
        file: checksum
        for file, checksum in noted.items()
        if (directory / file).is_file() and sha256_of(directory / file) == checksum
    }


def _write_safetensors(file: Path, layout: Layout, weights: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
    """Write the next tensors of `weights`, which `layout` announces, without holding more than one weight.

    The safetensors library wants all tensors of a file in memory; the format itself is a length, a JSON
    header of dtypes, shapes and offsets, and the bytes (github.com/huggingface/safetensors, README, "Format").
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
            assert name == expected and tensors.keys() == layout[name].keys()
            for key, tensor in tensors.items():
                assert (tensor.dtype, tuple(tensor.shape)) == layout[name][key]
                handle.seek(8 + len(text) + header[key]["data_offsets"][0])
                handle.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _num_bytes(part: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = part
    return dtype.itemsize * math.prod(shape)
