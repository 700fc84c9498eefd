"""Initialize adapters from the base's weights: PiSSA (arXiv 2404.02948) and LoftQ (arXiv 2310.08659).

W (out, in) is the original weight, read again from the model's files one tensor at a time; q quantizes and
dequantizes (in a 16-bit base: rounds to bf16); svd_r(X) = U S V^T of the r largest singular values, split evenly:
s B A = svd_r(X) with A = (S / s)^1/2 V^T (r, in), B = U (S / s)^1/2 (out, r).

    PiSSA      s B0 A0 = svd_r(W)                  base = q(W - s B0 A0)            its equations 2 to 4, and 5.3
    LoftQ      s B_t A_t = svd_r(W - Q_t)          Q_t = q(W - s B_{t-1} A_{t-1})   its algorithm 1, t = 1 ... T
                                                   base = Q_T, B_0 A_0 = 0

Base and adapter together start nearer to W than q(W) is. LoftQ's first round does not change the base: the result
is plain LoRA with other initial values. PiSSA and later rounds change it. What was subtracted from W, the
*base shift* D = B' A' with s inside B', is saved with the adapter; lora/base_shift.py rebuilds the base from it.

A base that is stored in 4 bits has no original: W is then the dequantized weight, and LoftQ has nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import lora_layers
from qlora.lora.base_shift import ANOTHERS_BASE, base_shift, original_weights, store_weight
from qlora.lora.linalg import split_svd
from qlora.lora.slot import slot_of
from qlora.lora.targets import head_name
from qlora.model.base import find_base_info
from qlora.model.weights import is_stored_in_4bit, shifted_weight
from qlora.quant.linear import explain_not_plain, is_plain
from qlora.quant.weight import QuantConfig, dequantize_weight, quantization_of, quantize_weight
from qlora.system.errors import InputError


def loftq_factors(
    weight: Tensor, quant: QuantConfig, rank: int, scaling: float, iterations: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """LoftQ's algorithm 1 on one weight W (out, in) fp32.

    Returns:
        (A_T, B_T, what was subtracted from W before its last quantization; None after a single round).
    """
    shift: tuple[Tensor, Tensor] | None = None
    A, B = split_svd(weight - _quantized(weight, quant), rank, scaling)
    for _ in range(iterations - 1):
        shift = (A, scaling * B)
        A, B = split_svd(weight - _quantized(shifted_weight(weight, shift), quant), rank, scaling)
    return A, B, shift


def _quantized(weight: Tensor, quant: QuantConfig) -> Tensor:
    return dequantize_weight(quantize_weight(weight, quant), torch.float32)


# ---- a fresh adapter --------------------------------------------------------------------------------------


@torch.no_grad()
def initialize_adapter(model: nn.Module, config: LoRAConfig) -> None:
    """Initialize the fresh active adapter of `model` as `config.init` says, and shift its base if needed.

    Call it after `inject_lora`, which has already done kaiming and gaussian.

    Raises:
        InputError: this initialization does not support the base, or the base is shifted already.
    """
    if not config.starts_from_base:
        return
    if base_shift(model):
        raise InputError(ANOTHERS_BASE)
    info = find_base_info(model)
    if config.init == "loftq" and (info is None or info.quantization is None):
        raise InputError("init loftq fits the error of quantizing, but this base is in 16 bits; pass --use-4bit.")
    if config.init == "loftq" and info is not None and is_stored_in_4bit(info.source):
        raise InputError(
            "init loftq fits the error of quantizing, but this base is there in 4 bits only; pass --model "
            "with the one that was quantized, or --init pissa."
        )
    layers, shift = lora_layers(model), {}
    if (head := head_name(model)) in layers:
        raise InputError(
            f"init {config.init} changes the weights it starts from; leave {head} out of the targets."
        )
    for name, layer in layers.items():
        if not is_plain(layer.base_layer):
            raise InputError(f"{name} {explain_not_plain(layer.base_layer)}; adapt it without init {config.init}.")
        most = min(layer.out_features, layer.in_features)
        if layer.weights.rank > most:
            raise InputError(
                f"{name} has rank {layer.weights.rank} but only {most} singular values; give --rank {most}."
            )
    for name, weight in original_weights(model, layers):
        layer, stored = layers[name], layers[name].base_layer.weight
        rank, scaling = layer.weights.rank, layer.weights.scaling
        if config.init == "pissa":
            A, B = split_svd(weight, rank, scaling)
            taken: tuple[Tensor, Tensor] | None = (A, scaling * B)
        else:
            A, B, taken = loftq_factors(weight, quantization_of(stored), rank, scaling, config.loftq_iterations)
        _share((A, B, *(taken or ())))
        layer.weights.lora_A.copy_(A)
        layer.weights.lora_B.copy_(B)
        if taken is not None:
            shift[name] = taken
            store_weight(layer.base_layer, shifted_weight(weight, taken))
        layer.kept_of_base = None
        if layer.weights.variant is not None:
            layer.weights.variant.follow_start(layer)
    slot_of(model).shift = shift


def _share(tensors: Collection[Tensor]) -> None:
    """Copy rank 0's values to every rank: an SVD may round differently elsewhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
