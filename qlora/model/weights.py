"""Read weights one at a time: as stored, as quantized, or dequantized in the original layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.cache import find_source
from qlora.model.resolve import open_source, resolve_model
from qlora.model.safetensors_source import SafetensorsSource, saved_name
from qlora.model.skeleton import (
    Source,
    empty_model,
    match_names,
    matrix_layers,
    names_to_quantize,
    transposed_names,
)
from qlora.quant.library import Params4bit
from qlora.quant.storage import unpack_tensors
from qlora.quant.weight import QuantConfig, dequantize_weight, quantization_of, quantize_weight
from qlora.system.errors import InputError
from qlora.system.wording import explain


def dequantized_weights(
    model: str,
    quant: QuantConfig | None,
    original: bool = False,
    shift: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model by name, one at a time, as `load_base_model` would compute with it.

    Args:
        quant: how the blocks are quantized; None for a 16-bit base.
        original: yield the stored weight itself, not the dequantized one.
        shift: the base shift of a PiSSA or LoftQ adapter (see lora/svd_start.py), subtracted before quantizing.
    Yields:
        (name, fp32 tensor), names as transformers saves them, tied ones once.
    Raises:
        InputError: as `load_base_model`; or `original` for a checkpoint that is stored in 4 bits.
    """
    is_calibrated = quant is not None and quant.calibration != "" and not original
    source: Source = find_source(model, quant) if is_calibrated else open_source(resolve_model(model))
    network = empty_model(model)
    stored = match_names(network, source)
    blocks = names_to_quantize(network, source) if quant is not None else set()
    transposed = transposed_names(network)
    kind = network.config.model_type
    for name in stored:
        packed = read_packed_weight(source, stored[name], torch.device("cpu"))
        if packed is not None and original:
            raise InputError(f"--model {model} is stored in 4 bits and has no original weights to merge into.")
        layer = name.removesuffix(".weight")
        if shift and name != layer and layer in shift:
            tensor = source.read(stored[name]) if packed is None else dequantize_weight(packed, torch.float32)
            turned = name in transposed and packed is None
            weight = shifted_weight(tensor.T if turned else tensor, shift[layer])
            how = quantization_of(packed) if packed is not None else quant if name in blocks else None
            if how is not None and not original:
                weight = dequantize_weight(quantize_weight(weight, how), torch.float32)
            yield saved_name(name, kind), weight.T if name in transposed else weight
            continue
        if packed is None:
            tensor = source.read(stored[name])
            if quant is None or name not in blocks or original:
                yield saved_name(name, kind), tensor.float()
                continue
            packed = quantize_weight(tensor.T if name in transposed else tensor, quant)
            del tensor
        dense = dequantize_weight(packed, torch.float32)
        yield saved_name(name, kind), dense.T if name in transposed else dense


def read_weights(model: str, layers: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight (out, in) fp32) of the named linear layers from a model's files, one at a time.

    4-bit codes in the files are dequantized.
    """
    read = weight_reader(model)
    return ((layer, read(layer)) for layer in layers)


def weight_reader(model: str) -> Callable[[str], Tensor]:
    """A function that reads the weight (out, in) fp32 of a linear layer, by its name, from a model's files."""
    source, network = open_source(resolve_model(model)), empty_model(model)
    stored, transposed = match_names(network, source), transposed_names(network)

    def read(layer: str) -> Tensor:
        name = f"{layer}.weight"
        packed = read_packed_weight(source, stored[name], torch.device("cpu"))
        if packed is not None:
            return dequantize_weight(packed, torch.float32)
        tensor = source.read(stored[name]).float()
        return tensor.T.contiguous() if name in transposed else tensor

    return read


def is_stored_in_4bit(model: str) -> bool:
    """Whether a model's files hold 4-bit codes instead of original weights."""
    return bool(open_source(resolve_model(model)).packed)


def shifted_weight(weight: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """W - B' A' for a weight (out, in) and factors (A', B'), exact to the last bit of fp32.

    The product is in fp64, so that every machine gets the same 4-bit codes.
    """
    A, B = (factor.to(weight.device, torch.float64) for factor in factors)
    pieces = zip(weight.split(1024), B.split(1024), strict=True)  # rows of a large product in fp64
    return torch.cat([(rows.double() - part @ A).float() for rows, part in pieces])


def read_packed_weight(
    source: Source, key: str, device: torch.device, as_views: bool = False
) -> Params4bit | None:
    """The 4-bit weight stored under `key` and its companions, or None if it is stored dense.

    Args:
        as_views: views of the file's mapped pages, freed with the weight; for the CPU.
    """
    if not isinstance(source, SafetensorsSource) or key not in source.packed:
        return None
    tensors = source.read_packed(key, as_views)
    try:
        return unpack_tensors(tensors, device)
    except ValueError as error:
        raise InputError(
            f"{source.path}: {key} is not a 4-bit weight ({explain(error)}); {source.remedy}."
        ) from error


def stored_weights(
    network: Any,
    source: Source,
    quant: QuantConfig | None,
    device: torch.device,
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, tied ones once, in its final form; each is read when it is requested.

    Args:
        quant: how to quantize the blocks' matrices; None leaves them in bf16.
        is_wanted: which to read, by name.
    Returns:
        Params4bit for them; bf16 for embeddings, the head and other matrices; fp32 for norms, biases and routers.
    Raises:
        InputError: weights that do not fit the model, before any is read.
    """
    stored = match_names(network, source)
    to_quantize = names_to_quantize(network, source) if quant is not None else set()
    transposed = transposed_names(network)
    matrices = matrix_layers(network)
    embeddings = {name for name, module in network.named_modules() if isinstance(module, nn.Embedding)}
    in_bf16 = {f"{name}.weight" for name in embeddings.union(matrices)}
    head = network.get_output_embeddings()

    def read(name: str) -> Tensor:
        packed = read_packed_weight(source, stored[name], device)
        if packed is not None:  # the loss needs the head's matrix, the look-up an embedding's rows
            stays_packed = matrices.get(name.removesuffix(".weight"), head) is not head
            return packed if stays_packed else dequantize_weight(packed, torch.float32)
        dense = source.read(stored[name]).to(device)
        if quant is not None and name in to_quantize:
            return quantize_weight(dense.T if name in transposed else dense, quant)
        return dense.to(torch.bfloat16 if name in in_bf16 else torch.float32)

    return ((name, read(name)) for name in stored if is_wanted(name))
