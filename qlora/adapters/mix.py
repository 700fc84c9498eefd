"""Sums and differences of adapters, as adapters.

In a layer, adapter i adds D_i = B_i A_i to the frozen W (scaling included in the factors), so updates add up:

    D = sum_i w_i D_i                         w_i: any numbers; negative ones subtract

    cat      A = [a_1 A_1; a_2 A_2; ...],  B = [b_1 B_1, b_2 B_2, ...]       B A = D exactly; the ranks add up
    svd      D = U S V^T, cut after the r largest singular values: the matrix of rank r nearest to D
             (Eckart and Young 1936); it keeps |D_r| / |D| of the norm
    linear   A = sum_i a_i A_i,  B = sum_i b_i B_i                 PEFT's "linear"; the rank stays the same

with b_i = sqrt|w_i| and a_i = b_i sgn(w_i). "linear" is *not* D: its B A also holds every product of one adapter's
B with another's A. D is never formed for its SVD (lora/linalg.py).

Stacking: two adapters active at once compute y = W x + B_1 A_1 x + B_2 A_2 x = (W + D_1 + D_2) x. This is "cat"
with weights 1 and 1, so a stack is an ordinary adapter. It differs from training both together.

DoRA (which rescales W + B A) and parameters trained in full are not such sums; merge those.

I inputs, O outputs, R rank. Factors are fp32; decompositions and norms are computed in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from statistics import mode
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.adapters.files import is_one_file, recorded_quantization
from qlora.adapters.peft_config import PREFIX, describe_adapter
from qlora.adapters.peft_files import AdapterSnapshot, SavedAdapter, read_adapter, write_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.linalg import low_rank_svd
from qlora.lora.slot import Adapter
from qlora.lora.variants import variant_of
from qlora.system.errors import InputError
from qlora.system.files import new_directory
from qlora.system.wording import list_first

Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A (R, I), B (O, R); the update is B A
Method = Literal["cat", "svd", "linear"]


# ---- on factors -------------------------------------------------------------------------------------------


def mix(
    adapters: Sequence[Factors], weights: Sequence[float], method: Method = "cat", rank: int | None = None
) -> Factors:
    """The weighted sum of several updates, or (linear) PEFT's approximation of it.

    In a layer that only some adapters have, sum over those.

    Args:
        rank: of the result under svd; None = the adapters' largest rank.
    Returns:
        Factors whose ranks may differ from layer to layer.
    Raises:
        InputError: not one weight per adapter, different shapes, NaN, or ranks that linear cannot add.
    """
    if method not in ("cat", "svd", "linear"):
        raise InputError(f"The method of mixing is {method!r}; choose cat, svd or linear.")
    if rank is not None and (rank < 1 or method != "svd"):
        raise InputError(f"rank is {rank} with {method}; only svd takes a rank, of 1 or more.")
    _check(adapters, weights, equal_ranks=method == "linear")
    layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter))
    parts = {
        layer: [_weighted(a[layer], w) for a, w in zip(adapters, weights, strict=True) if layer in a]
        for layer in layers
    }
    if method == "linear":
        return {
            layer: (torch.stack([A for A, _ in own]).sum(0), torch.stack([B for _, B in own]).sum(0))
            for layer, own in parts.items()
        }
    stacked = {
        layer: (torch.cat([A for A, _ in own]), torch.cat([B for _, B in own], 1)) for layer, own in parts.items()
    }
    if method == "cat":
        return stacked
    return truncate(stacked, rank or max(A.shape[0] for adapter in adapters for A, _ in adapter.values()))


def add(first: Factors, second: Factors) -> Factors:
    """The exact sum of both updates."""
    return mix([first, second], [1.0, 1.0])


def subtract(first: Factors, second: Factors) -> Factors:
    """The exact difference of two updates."""
    return mix([first, second], [1.0, -1.0])


def truncate(factors: Factors, rank: int) -> Factors:
    """The nearest update of at most this rank in every layer, singular values split evenly between A and B."""
    result = {}
    for layer, (A, B) in factors.items():
        U, S, Vh = low_rank_svd(A, B, rank)
        root = S.sqrt()
        result[layer] = ((root[:, None] * Vh).float(), (U * root).float())
    return result


def update_norm(factors: Factors) -> float:
    """Frobenius norm of the update over all layers: |B A|^2 = sum of (B^T B) * (A A^T)."""
    pairs = ((A.double(), B.double()) for A, B in factors.values())
    return math.sqrt(max(0.0, sum(((B.T @ B) * (A @ A.T)).sum().item() for A, B in pairs)))


def distance(actual: Factors, expected: Factors) -> float:
    """|actual - expected| / |expected|, in Frobenius norm over all layers."""
    size, difference = update_norm(expected), update_norm(subtract(actual, expected))
    return difference / size if size else float(difference > 0)


def _weighted(factors: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Tensor]:
    A, B = factors
    return math.copysign(math.sqrt(abs(weight)), weight) * A, math.sqrt(abs(weight)) * B


def _check(adapters: Sequence[Factors], weights: Sequence[float], equal_ranks: bool) -> None:
    if not adapters or len(adapters) != len(weights):
        raise InputError(f"There are {len(weights)} weights for {len(adapters)} adapters; give one for each.")
    if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
        raise InputError(f"The weights are {', '.join(map(str, weights))}; give finite numbers.")
    problems = []
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter):
        own = [adapter[layer] for adapter in adapters if layer in adapter]
        shapes, ranks = {(B.shape[0], A.shape[1]) for A, B in own}, {A.shape[0] for A, _ in own}
        if len(shapes) > 1:
            problems.append(f"{layer} is {' and '.join(map(str, sorted(shapes)))}")
        elif not all(factor.isfinite().all() for factors in own for factor in factors):
            problems.append(f"{layer} holds NaN or infinity")
        elif equal_ranks and len(ranks) > 1:
            problems.append(f"{layer} has the ranks {' and '.join(map(str, sorted(ranks)))}")
    if problems:
        advice = "adapters of one base, and of one rank under linear (cat and svd take any)"
        raise InputError(f"The adapters do not go together: {list_first(problems)}; mix {advice}.")


# ---- on adapters ------------------------------------------------------------------------------------------


def adapter_factors(adapter: Adapter) -> Factors:
    """Copies of the factors of an adapter in memory, with the scaling split evenly, as "linear" requires.

    Raises:
        InputError: DoRA, or parameters that trained in full.
    """
    _check_is_sum(adapter.config, adapter.trained, "The adapter")
    return {
        layer: _weighted((weights.effective_A.detach().float(), weights.lora_B.detach().float()), weights.scaling)
        for layer, weights in adapter.layers.items()
    }


def saved_factors(saved: SavedAdapter) -> Factors:
    """The factors of an adapter on disk, with shapes checked as far as possible without its base."""
    _check_is_sum(saved.config, {**saved.trained, **saved.rows}, str(saved.directory))
    problems = []
    for layer in saved.adapted_layers:
        keys = [f"{layer}.lora_{part}.weight" for part in "AB"]
        missing = [key for key in keys if key not in saved.state]
        problems += [f"missing {key}" for key in missing]
        if not missing:
            rank, (A, B) = saved.config.rank_of(layer), (saved.state[key] for key in keys)
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
                problems.append(f"{layer} has A {tuple(A.shape)} and B {tuple(B.shape)}, not of rank {rank}")
    if problems:
        raise InputError(f"The adapter in {saved.directory} is damaged: {list_first(problems)}.")
    result = {}
    for layer in saved.adapted_layers:
        A, B = saved.low_rank(layer)  # the whole scaling in B
        share = math.sqrt(saved.config.scaling_of(layer, A.shape[0]))
        result[layer] = (share * A, B / share)
    return result


def mixed_config(factors: Factors) -> LoRAConfig:
    """The configuration of an adapter with these factors: alpha = rank everywhere, so that the scaling is 1."""
    ranks = {layer: A.shape[0] for layer, (A, _) in factors.items()}
    rank = mode(ranks.values())
    others = {layer: own for layer, own in ranks.items() if own != rank}
    return LoRAConfig(
        rank=rank,
        alpha=float(rank),
        rank_pattern=others,
        alpha_pattern=dict[str, float](others),
        target_modules=list(ranks),
        adapter_dtype="float32",
    )


def mix_adapters(
    directories: Sequence[str],
    weights: Sequence[float],
    output_dir: str,
    method: Method = "cat",
    rank: int | None = None,
) -> float:
    """Write a mix of saved adapters as an adapter, in fp32; their base is not loaded.

    Args:
        output_dir: must not exist; weights, method and rank are as for `mix`.
    Returns:
        Distance of the mix from the weighted sum of the updates, relative to that sum's norm: 0 for cat.
    Raises:
        InputError: as `mix`; or adapters have different bases, or one is not a low-rank sum.
    """
    if Path(output_dir).exists():
        raise InputError(f"--output-dir {output_dir} exists already; remove it or choose another.")
    saved = [read_adapter(directory) for directory in directories]
    adapters = [saved_factors(one) for one in saved]
    mixed = mix(adapters, weights, method, rank)
    base = _common(saved, [str(one.description.get("base_model_name_or_path") or "") for one in saved], "base")
    quantization = _common(saved, [_base_quantization(one) for one in saved], "quantization of the base")
    config = mixed_config(mixed)
    transposed = any(one.description.get("fan_in_fan_out") is True for one in saved)
    description = describe_adapter(config, list(mixed), base, transposed)
    state = {
        f"{PREFIX}{layer}.lora_{part}.weight": factor.contiguous()
        for layer, factors in mixed.items()
        for part, factor in zip("AB", factors, strict=True)
    }
    metadata = {"base_quantization": quantization} if quantization else {}
    snapshot = AdapterSnapshot(state, description, metadata)
    if is_one_file(Path(output_dir)):
        write_adapter(snapshot, output_dir)
    else:
        with new_directory(Path(output_dir)) as staging:  # a failure leaves nothing
            write_adapter(snapshot, staging)
    return distance(mixed, mix(adapters, weights))


def _check_is_sum(config: LoRAConfig, trained: dict[str, Any], who: str) -> None:
    variant = variant_of(config)
    what = f"{len(trained)} parameters trained in full" if trained else ""
    what = variant.name if variant is not None and variant.beyond else what
    if what:
        raise InputError(f"{who} has {what}, which no low-rank update expresses; merge it into its base instead.")


def _common(saved: Sequence[SavedAdapter], values: Sequence[str], what: str) -> str:
    """The value that all share; paths count by their last part, since a base may be kept in several places."""
    given = {Path(value).name: value for value in values if value}
    if len(given) > 1:
        listed = "; ".join(f"{one.directory}: {value!r:.80}" for one, value in zip(saved, values, strict=True))
        raise InputError(f"The adapters name more than one {what} ({listed}); mix adapters of the same base.")
    return next(iter(given.values()), "")


def _base_quantization(saved: SavedAdapter) -> str:
    """The weights file's entry for it, unparsed; other tools' adapters have none."""
    return recorded_quantization(saved.directory) or ""
