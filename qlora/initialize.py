"""Adapters that start from the base's weights: PiSSA (arXiv 2404.02948) and LoftQ (arXiv 2310.08659).

W (out, in) is the original weight, read again from the model's files one tensor at a time; q quantizes and
dequantizes (in a 16-bit base: rounds to bf16); svd_r(X) = U S V^T of the r largest singular values, split evenly:
s B A = svd_r(X) with A = (S / s)^1/2 V^T (r, in), B = U (S / s)^1/2 (out, r).

    PiSSA      s B0 A0 = svd_r(W)                  base = q(W - s B0 A0)            its equations 2 to 4, and 5.3
    LoftQ      s B_t A_t = svd_r(W - Q_t)          Q_t = q(W - s B_{t-1} A_{t-1})   its algorithm 1, t = 1 ... T
                                                   base = Q_T, B_0 A_0 = 0

Base and adapter together begin nearer to W than q(W) is. LoftQ's first round leaves the base alone: the result is
a plain LoRA adapter with another start. PiSSA and later rounds change it. What was subtracted from W, the *base
shift* D = B' A' with s inside B', is kept beside the adapter, and whoever loads that adapter makes the same base
again: read W, subtract, quantize (`shift_base`). D is multiplied in fp64, so that machines agree on W - D to the
last bit of fp32 and with that on the 4-bit codes.

A base that is stored in 4 bits has no original: what its codes stand for is W then, and LoftQ has nothing to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.injection import lora_layers, wrapped_layers
from qlora.lora import LoRALinear
from qlora.model import is_stored_in_4bit, read_weights, shifted_weight
from qlora.quantize import (
    Params4bit,
    QuantConfig,
    dense_weight,
    dequantize_weight,
    quantization_of,
    quantize_weight,
)

BaseShift = dict[str, tuple[Tensor, Tensor]]  # layer -> (A' (r, in), B' (out, r)) fp32; its base is q(W - B' A')
ANOTHERS_BASE = "The base was changed for a PiSSA or LoftQ adapter and fits no other one; load the base afresh."
TOLERANCE = 1e-5  # of a singular triplet's residual, relative to its singular value
SMALL = 512  # a matrix with no side longer than this is decomposed whole


# ---- singular values --------------------------------------------------------------------------------------


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets, to fp32's accuracy, by block Krylov iteration (arXiv 1504.05477).

    The space of G, M G, M^2 G, ... with M = W^T W and a few random columns G holds them after some products;
    `torch.svd_lowrank` keeps the last power alone and needs many times as many where singular values lie close.

    Args:
        matrix: W (out, in) fp32.
    Returns:
        U (out, rank), S (rank,) falling, V^T (rank, in). A sign is free in each triplet, U S V^T is not.
    """
    width = rank + 8
    if max(matrix.shape) <= SMALL or 4 * width > min(matrix.shape):
        return _whole_svd(matrix, rank)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(start)[0]  # (in, k) orthonormal
    product = matrix @ basis  # (out, k)
    while basis.shape[1] + width <= min(matrix.shape) // 2:
        for _ in range(4):
            block = matrix.T @ product[:, -width:]
            for _ in range(2):  # twice is enough for orthogonality to rounding
                block -= basis @ (basis.T @ block)
            block = torch.linalg.qr(block)[0]
            basis, product = torch.cat([basis, block], 1), torch.cat([product, matrix @ block], 1)
        values, vectors = torch.linalg.eigh((product.T @ product).double())
        S, chosen = values.flip(0)[:rank].clamp(min=0).sqrt().float(), vectors.flip(1)[:, :rank].float()
        U, V = product @ chosen / S, basis @ chosen
        if bool(((matrix.T @ U - V * S).norm(dim=0) <= TOLERANCE * S).all()):
            return U, S, V.T
    return _whole_svd(matrix, rank)


def _whole_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def split_svd(matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) with scaling B A = svd_rank(matrix), the singular values split evenly."""
    U, S, Vh = truncated_svd(matrix, rank)
    root = (S / scaling).sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def loftq_factors(
    weight: Tensor, quant: QuantConfig, rank: int, scaling: float, iterations: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """LoftQ's algorithm 1 on one weight W (out, in) fp32.

    Returns:
        (A_T, B_T, what was subtracted from W before its last quantization: None after a single round).
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
    """Give the fresh active adapter of `model` the start that `config.init` names, and its base the shift.

    Call it behind `inject_lora`. Nothing to do for kaiming and gaussian, with which adapters are made.

    Raises:
        InputError: a base that this start is not made for, or one that is shifted already.
    """
    if config.init not in ("pissa", "loftq"):
        return
    if base_shift(model):
        raise InputError(ANOTHERS_BASE)
    source: Any = getattr(model, "source", None)
    if config.init == "loftq" and getattr(model, "quantization", None) is None:
        raise InputError("init loftq fits the error of quantizing, but this base is in 16 bits; pass --use-4bit.")
    if config.init == "loftq" and (source is None or is_stored_in_4bit(source)):
        raise InputError(
            "init loftq fits the error of quantizing, but this base is there in 4 bits only; pass --model "
            "with the one that was quantized, or --init pissa."
        )
    layers, shift = lora_layers(model), {}
    for name, layer in layers.items():
        most = min(layer.out_features, layer.in_features)
        if layer.rank > most:
            raise InputError(f"{name} has rank {layer.rank} but only {most} singular values; give --rank {most}.")
    for name, weight in _original_weights(model, layers):
        layer, stored = layers[name], layers[name].base_layer.weight
        rank, scaling = layer.rank, layer.scaling
        if config.init == "pissa":
            A, B = split_svd(weight, rank, scaling)
            taken: tuple[Tensor, Tensor] | None = (A, scaling * B)
        else:
            A, B, taken = loftq_factors(weight, quantization_of(stored), rank, scaling, config.loftq_iterations)
        _share((A, B, *(taken or ())))
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        if taken is not None:
            shift[name] = taken
            _store(layer.base_layer, shifted_weight(weight, taken))
        layer._squared_norms = None
        if layer.weights.magnitude is not None:
            layer.weights.magnitude.copy_(layer.weight_norm())
    model.__dict__["_base_shift"] = shift


def _share(tensors: Collection[Tensor]) -> None:
    """Take rank 0's values on every rank: an SVD may round differently elsewhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


# ---- the shifted base -------------------------------------------------------------------------------------


def base_shift(model: nn.Module) -> BaseShift:
    """What was subtracted from the weights of this model; empty for an ordinary base."""
    return model.__dict__.get("_base_shift", {})


def same_shift(one: BaseShift, other: BaseShift) -> bool:
    """Whether two shifts make the same base, bit for bit."""
    return one.keys() == other.keys() and all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        for name in one
        for a, b in zip(one[name], other[name], strict=True)
    )


def check_base(model: nn.Module, shift: BaseShift, ready: bool = False) -> None:
    """Whether an adapter with this shift may be put onto `model`.

    Args:
        ready: the base must have this shift already.
    Raises:
        InputError: another adapter's base is there, or other adapters share this one.
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
    """Replace the weights of the layers in `shift` by q(W - B' A'), in place, whatever their shift was before.

    Raises:
        InputError: the shift of a layer that was shifted already and is not in `shift`.
    """
    if base_shift(model).keys() - shift.keys():
        raise InputError("The base has shifted layers that this adapter leaves alone; load the base afresh.")
    if same_shift(base_shift(model), shift):
        return
    layers = {name: model.get_submodule(name) for name in shift}
    for name, weight in _original_weights(model, layers):
        layer = layers[name]
        _store(layer.base_layer if isinstance(layer, LoRALinear) else layer, shifted_weight(weight, shift[name]))
        if isinstance(layer, LoRALinear):
            layer._squared_norms = None
    model.__dict__["_base_shift"] = shift


def pissa_shift(model: str, scalings: dict[str, tuple[int, float]]) -> BaseShift:
    """The shift of a PiSSA adapter that does not carry it: PEFT finds it by another SVD of W, and so does this.

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


def _original_weights(model: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(layer, W (out, in) fp32 on its device): out of the model's files, or for want of them as it lies here."""
    device = next(model.parameters()).device
    source: Any = getattr(model, "source", None)
    if source is not None:
        yield from ((name, weight.to(device)) for name, weight in read_weights(source, layers))
        return
    for name in layers:
        layer = model.get_submodule(name)
        assert name not in base_shift(model), "the original weight is gone"
        yield name, dense_weight(layer.base_layer if isinstance(layer, LoRALinear) else layer, torch.float32)


def _store(layer: Any, weight: Tensor) -> None:
    """Put a weight (out, in) into a frozen layer, in the form in which the layer keeps its own."""
    old = layer.weight
    if isinstance(old, Params4bit):
        packed = quantize_weight(weight, quantization_of(old))
        packed.module = layer
        layer.weight, layer.quant_state = packed, packed.quant_state
    else:
        old.data = (weight if isinstance(layer, nn.Linear) else weight.T.contiguous()).to(old.dtype)
