"""Write merged weights as safetensors shards, dense (16 bits) or packed (4 bits), in resumable steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.export.mixture import Mixture
from qlora.lora.full_parameters import named_base_parameters, vocabulary_names
from qlora.lora.targets import linear_layers
from qlora.model.base import base_info
from qlora.model.load import load_base_model
from qlora.model.safetensors_source import module_name, saved_name
from qlora.model.shards import Parts, layout_of, plan_shards, stored_parts, write_shards
from qlora.model.weights import dequantized_weights
from qlora.quant.gptq import input_moments, requantize
from qlora.quant.library import Params4bit
from qlora.quant.storage import quantization_config
from qlora.quant.weight import QuantConfig, dequantize_weight
from qlora.system.files import new_file, read_json, sha256_of

GB = 10**9
SHARDS = "shards.json"  # in the staging directory: checksum of each finished file


class DenseWriter:
    """Merged weights in bf16, read, merged and dropped one at a time."""

    quantization_config: dict[str, Any] | None = None

    def __init__(self, model: str, mixture: Mixture, original: bool, network: Any) -> None:
        self.model, self.mixture, self.original = model, mixture, original
        self.shapes = mixture.merged_shapes(network)
        self.layout = {name: {name: (torch.bfloat16, shape)} for name, shape in self.shapes.items()}
        layers = linear_layers(network).items()
        self.transposed = {f"{name}.weight" for name, layer in layers if not isinstance(layer, nn.Linear)}
        self.embedding = vocabulary_names(network)[0]

    def tensors(self, wanted: Collection[str]) -> Iterator[tuple[str, Parts]]:
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
        self.quantization_config = network_quantization(self.network, own)
        mixture.load_onto(self.network)
        parameters = {
            saved_name(name, kind): p.detach() if p.is_floating_point() else p
            for name, p in named_base_parameters(self.network)
        }
        self.parameters = {name: parameters[name] for name in shapes}
        self.mixture, self.texts = mixture, texts
        self.layout = {}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Params4bit):
                self.layout[name] = layout_of(stored_parts(name, parameter))
            else:
                self.layout[name] = {name: (torch.bfloat16, shapes[name])}

    def tensors(self, wanted: Collection[str]) -> Iterator[tuple[str, Parts]]:
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
            yield name, stored_parts(name, parameter)


def network_quantization(network: nn.Module, quant: QuantConfig) -> dict[str, Any]:
    """config.json's entry for a 4-bit network; it names the linear layers that are not quantized."""
    linears = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    skipped = [name for name, module in linears if not isinstance(module.weight, Params4bit)]
    return {**quantization_config(quant), "llm_int8_skip_modules": skipped}


def write_merged_shards(
    writer: DenseWriter | PackedWriter, directory: Path, max_shard_size: int, say: Callable[[str], Any]
) -> None:
    """Write all tensors into safetensors files of at most `max_shard_size` bytes, and the index.

    Files that are there already, whole by their checksums, are left as they are.
    """
    finished = _finished_shards(directory)
    if finished:
        num_files = len(plan_shards(writer.layout, max_shard_size))
        say(f"continuing an interrupted merge: {len(finished)} of {num_files} files are finished")

    def note(file: Path) -> None:
        finished[file.name] = sha256_of(file)
        with new_file(directory / SHARDS) as staging:
            staging.write_text(json.dumps(finished))

    write_shards(directory, writer.layout, writer.tensors, max_shard_size, set(finished), note)


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
