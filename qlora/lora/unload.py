"""Take LoRA out of a model again: merged into plain layers, or the base as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.lora.adapter import activate, lora_layers
from qlora.lora.layer import LoRALinear
from qlora.lora.slot import AdapterSlot, network_of, slot_of
from qlora.lora.trainable import unmerge_lora
from qlora.model.base import find_base_info
from qlora.quant.layers import Linear16bit, dense_weight, is_out_in
from qlora.quant.library import Params4bit
from qlora.quant.linear import explain_not_plain, is_linear, is_plain, registered_shape
from qlora.quant.parts import part_of
from qlora.quant.weight import quantization_of, quantize_weight
from qlora.system.errors import InputError


@torch.no_grad()
def merge_and_unload(model: nn.Module, quantize: bool = False) -> nn.Module:
    """Add the active adapter to the weights, in place, and take every trace of LoRA out of the model.

    A layer keeps its type, orientation, bias and dtype. Every 4-bit linear layer, adapted or not, becomes an
    nn.Linear (in GPT-2 a Conv1D) in the base's compute dtype, so that transformers can save the model, as does an
    adapted `Linear16bit`. Parameters that trained in full stay, in the base's dtype. All are frozen. A weight that
    was tied to another one is its own afterwards.

    Args:
        quantize: quantize adapted 4-bit layers again, as they were, and leave the others. That can erase a light
            fine-tune.
    Returns:
        The network itself.
    Raises:
        InputError: no adapter is active; a layer is more than its weight, or holds a part of one; or `quantize` of
            a base that is not in 4 bits. The model is unchanged.
    """
    model, layers = network_of(model), lora_layers(model)
    _check(layers, quantize)
    unmerge_lora(model)
    is_tied = _is_tied(model)
    info = find_base_info(model)
    compute_dtype = None if info is None else info.compute_dtype
    transposed = set() if quantize else _stored_transposed(model)
    plain = {id(layer): _merged_layer(layer, quantize, compute_dtype, transposed) for layer in layers.values()}
    slot = slot_of(model)
    for name, original in slot.replaced.items():  # the adapter's copies stay; tied ones once
        copy = slot.active.trained[name] if slot.active is not None else original
        copy.data = copy.data.to(original.dtype)
        copy.requires_grad = False
    _unwrap(model, plain)
    if not quantize:
        _make_dense(model, compute_dtype, transposed)
    network: Any = model
    if not quantize and getattr(model, "hf_quantizer", None) is not None:  # transformers loaded it in 4 bits
        network.hf_quantizer.remove_quantization_config(model)
    if is_tied and not _is_tied(model):
        network.config.tie_word_embeddings = False
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take every trace of LoRA out of the model, in place, and leave the base as it was.

    Returns:
        The network itself.
    Raises:
        InputError: the base was changed for a PiSSA or LoftQ adapter.
    """
    model = network_of(model)
    unmerge_lora(model)
    activate(model, None)
    _unwrap(model, {})
    return model


def _check(layers: dict[str, LoRALinear], quantize: bool) -> None:
    if not layers:
        raise InputError("No adapter is active; call set_adapter(name) first, or unload for the base.")
    for name, layer in layers.items():
        base = layer.base_layer
        shape = registered_shape(base)
        if shape is None and not is_plain(base):
            raise InputError(f"{name} {explain_not_plain(base)}, so it cannot be merged.")
        if shape is None and part_of(base) is not None:
            raise InputError(f"{name} holds a part of its weight; merge the saved adapter with qlora merge.")
    if quantize and not any(isinstance(layer.base_layer.weight, Params4bit) for layer in layers.values()):
        raise InputError("quantize is for a base in 4 bits, and this one has no adapted layer in 4 bits.")


def _stored_transposed(model: Any) -> set[int]:
    """Ids of the 4-bit layers that are a Conv1D, (in, out), in transformers' own model of this class."""
    packed = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if is_linear(module) and isinstance(module.weight, Params4bit)
    }
    if not packed:
        return set()
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    if not isinstance(model, PreTrainedModel):
        return set()
    with torch.device("meta"):
        fresh = type(model)(model.config)
    own = {name for name, module in fresh.named_modules() if isinstance(module, Conv1D)}
    return {id(module) for name, module in packed.items() if name in own}


def _merged_layer(
    layer: LoRALinear, quantize: bool, compute_dtype: torch.dtype | None, transposed: set[int]
) -> nn.Module:
    """A layer with the merged weight: the base layer itself, or a plain one for one of our storage formats."""
    base: Any = layer.base_layer
    merged, old = layer.merged(), base.weight
    if isinstance(old, Params4bit) and quantize:
        packed = quantize_weight(merged, quantization_of(old))
        packed.module = base
        base.weight, base.quant_state = packed, packed.quant_state
    elif isinstance(old, Params4bit) or isinstance(base, Linear16bit):
        state_dtype = old.quant_state.dtype if isinstance(old, Params4bit) else old.dtype
        return _dense(merged.to(compute_dtype or state_dtype), base.bias, id(base) in transposed)
    else:
        weight = (merged if is_out_in(base) else merged.T.contiguous()).to(old.dtype)
        base.weight = nn.Parameter(weight, requires_grad=False)  # a new one: the old may be tied
    return base


def _make_dense(model: nn.Module, compute_dtype: torch.dtype | None, transposed: set[int]) -> None:
    """Replace the 4-bit linear layers that are left, wherever the model uses them, by ordinary ones."""
    dense: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        own: Any
        for child, own in module._modules.items():
            weight = None if own is None or not is_linear(own) else own.weight
            if own is not None and isinstance(weight, Params4bit):
                if id(own) not in dense:
                    values = dense_weight(own, torch.float32)
                    values = values.to(compute_dtype or weight.quant_state.dtype)
                    dense[id(own)] = _dense(values, own.bias, id(own) in transposed)
                module._modules[child] = dense[id(own)].train(own.training)


def _dense(weight: Tensor, bias: Tensor | None, is_transposed: bool) -> nn.Module:
    """An nn.Linear, or a Conv1D, with a weight (out, in)."""
    layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    if is_transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(*weight.shape)
        weight = weight.T.contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer


def _unwrap(model: nn.Module, plain: dict[int, nn.Module]) -> None:
    """Replace every LoRALinear, wherever the model uses it, by the layer in `plain` under its id, or its base."""
    for module in list(model.modules()):
        for child, own in module._modules.items():
            if isinstance(own, LoRALinear):
                module._modules[child] = plain.get(id(own), own.base_layer).train(own.training)
    vars(model)["adapter_slot"] = AdapterSlot()


def _is_tied(model: Any) -> bool:
    """Whether the output head has the input embedding's weight."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    first, last = (getattr(getattr(end, "base_layer", end), "weight", None) for end in ends)
    return first is not None and first is last
