"""The base shift D = B' A' of PiSSA and LoftQ: what was subtracted from W before it was quantized again.

Loading such an adapter rebuilds the same base: read W, subtract, quantize (`shift_base`). D is multiplied in
fp64, so that machines agree on W - D to the last bit of fp32 and therefore on the 4-bit codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.lora.adapter import wrapped_layers
from qlora.lora.layer import LoRALinear
from qlora.lora.linalg import split_svd
from qlora.lora.slot import BaseShift, slot_of
from qlora.model.base import find_base_info
from qlora.model.weights import read_weights, shifted_weight
from qlora.quant.layers import dense_weight
from qlora.quant.library import Params4bit
from qlora.quant.weight import quantization_of, quantize_weight
from qlora.system.errors import InputError

ANOTHERS_BASE = "The base was changed for a PiSSA or LoftQ adapter and fits no other one; load the base afresh."


def base_shift(model: nn.Module) -> BaseShift:
    """What was subtracted from this model's weights; empty for an ordinary base."""
    return slot_of(model).shift


def same_shift(one: BaseShift, other: BaseShift) -> bool:
    """Whether two shifts make the same base, bit for bit."""
    return one.keys() == other.keys() and all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        for name in one
        for a, b in zip(one[name], other[name], strict=True)
    )


def check_base(model: nn.Module, shift: BaseShift, ready: bool = False) -> None:
    """Check that an adapter with this shift may be put onto `model`.

    Args:
        ready: require that the base already has this shift.
    Raises:
        InputError: the base is another adapter's, or other adapters share it.
    """
    if same_shift(base_shift(model), shift):
        return
    if base_shift(model):
        raise InputError(ANOTHERS_BASE)
    if ready or wrapped_layers(model):
        raise InputError(
            "A PiSSA or LoftQ adapter changes its base and so shares it with no other; load a base for it alone "
            "(load_adapter), or make plain LoRA of it (SavedAdapter.as_plain_lora)."
        )


@torch.no_grad()
def shift_base(model: nn.Module, shift: BaseShift) -> None:
    """Replace the weights of the layers in `shift` by q(W - B' A'), in place, whatever their previous shift.

    Raises:
        InputError: a layer was shifted before and is not in `shift`.
    """
    if base_shift(model).keys() - shift.keys():
        raise InputError("The base has shifted layers that this adapter leaves alone; load the base afresh.")
    if same_shift(base_shift(model), shift):
        return
    layers = {name: model.get_submodule(name) for name in shift}
    for name, weight in original_weights(model, layers):
        layer = layers[name]
        store_weight(
            layer.base_layer if isinstance(layer, LoRALinear) else layer, shifted_weight(weight, shift[name])
        )
        if isinstance(layer, LoRALinear):
            layer.kept_of_base = None
    slot_of(model).shift = shift


def pissa_shift(model: str, scalings: dict[str, tuple[int, float]]) -> BaseShift:
    """Compute the shift of a PiSSA adapter that does not store it by another SVD of W, as PEFT does.

    Args:
        model: the base: directory, hub id or .gguf.
        scalings: layer -> its rank and scaling.
    """
    shift = {}
    for name, weight in read_weights(model, scalings):
        rank, scaling = scalings[name]
        A, B = split_svd(weight, rank, scaling)
        shift[name] = (A, scaling * B)
    return shift


def original_weights(model: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(layer, W (out, in) fp32 on its device), from the model's files, or from memory if there are no files."""
    device = next(model.parameters()).device
    info = find_base_info(model)
    if info is not None:
        yield from ((name, weight.to(device)) for name, weight in read_weights(info.source, layers))
        return
    for name in layers:
        layer = model.get_submodule(name)
        assert name not in base_shift(model), "the original weight is gone"
        yield name, dense_weight(layer.base_layer if isinstance(layer, LoRALinear) else layer, torch.float32)


def store_weight(layer: Any, weight: Tensor) -> None:
    """Store a weight (out, in) in a frozen layer, in the layer's own format."""
    old = layer.weight
    if isinstance(old, Params4bit):
        packed = quantize_weight(weight, quantization_of(old))
        packed.module = layer
        layer.weight, layer.quant_state = packed, packed.quant_state
    else:
        old.data = (weight if isinstance(layer, nn.Linear) else weight.T.contiguous()).to(old.dtype)
