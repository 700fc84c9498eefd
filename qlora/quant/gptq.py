"""Quantize to 4 bits after a merge: choose codes so that the update survives.

A base W_hat lies on the grid of its 4-bit codes, and a fine-tuning update D is a few hundredths of a step of that
grid. Rounded to the nearest code, W_hat + D is W_hat again and the update is lost. But what matters is the layer's
output over the inputs it gets, not the weight:

    minimize over Q on the grid    E |x (Q - T)^T|^2  =  tr (Q - T) H (Q - T)^T        T = W_hat + D,  H = E x^T x

GPTQ (arXiv 2210.17323) rounds one input column after another and compensates each error in the columns still to
round, using the inputs' correlations. With H^-1 = U^T U (U upper triangular, the columns in rounding order, those
with the largest inputs first):

    q_j = nearest(w_j)        e = (w_j - q_j) / U_jj        w_k <- w_k - e U_jk    for all k > j

Outputs for which this is no better than plain rounding (an update too small to beat the noise) keep the nearest
codes. The scales stay those of the base unless the update outgrows them. Scales are used as dequantized (after
double quantization), so the errors fed back are those of the stored weight.

Shapes: O outputs, I inputs; W, T, Q (O, I); H (I, I), all fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora.quant.library import Params4bit
from qlora.quant.storage import packed_tensors, unpack_tensors
from qlora.quant.weight import block_scales, quantization_of, quantize_weight
from qlora.system.errors import InputError

# Share of H's mean diagonal added to its diagonal. GPTQ's 0.01 hides the small inputs: a few features of the first
# token are hundreds of times larger than all others.
DAMPING = 1e-4
GROUP = 64  # columns rounded before the rest of the weight is updated
OUTGROWN = 1.15  # times its scale is half a grid step beyond the largest weight that NF4 can say
MOMENT_BYTES = 2**30  # of second moments held at once


def requantize(target: Tensor, base: Params4bit, moment: Tensor, damping: float = DAMPING) -> Params4bit:
    """The 4-bit weight whose layer's output is closest to that of `target`.

    Args:
        target: (O, I) fp32.
        base: the weight that `target` updates; not changed.
        moment: (I, I) fp32 second moment of the layer's inputs, from `input_moments`.
    Returns:
        New codes, the rest as in `base`; also new scales if the update has outgrown the old ones.
    """
    if (target.abs() > OUTGROWN * _scales(base)).any():
        base = quantize_weight(target, quantization_of(base))
    scales = _scales(base)
    values, order = base.quant_state.code.to(target.device).sort()  # FP4's are ordered by their bits
    rounded = round_with_feedback(target, scales, values, moment, damping)
    nearest = _nearest(target / _positive(scales), values)
    errors = [values[indices] * scales - target for indices in (rounded, nearest)]
    fed_back, plain = (((error @ moment) * error).sum(1, keepdim=True) for error in errors)
    chosen = order[torch.where(fed_back < plain, rounded, nearest)].to(torch.uint8).flatten()
    if len(chosen) % 2:
        chosen = torch.cat([chosen, chosen.new_zeros(1)])
    codes = (chosen[::2] << 4 | chosen[1::2]).view(-1, 1)
    return unpack_tensors({**packed_tensors(base), "": codes.view_as(base.data)}, target.device)


def round_with_feedback(
    target: Tensor, scales: Tensor, values: Tensor, moment: Tensor, damping: float = DAMPING
) -> Tensor:
    """GPTQ on a given grid.

    Args:
        target, scales: (O, I) fp32; weight (o, i) can be any of scales[o, i] * values.
        values: (16,) fp32, ascending.
    Returns:
        (O, I) int64 indices into `values`.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    U = _inverse_factor(moment[order][:, order], damping)
    # Transposed, to make a column of the layer's inputs contiguous.
    W, S = target.T[order], _positive(scales).T[order]
    indices = torch.empty_like(W, dtype=torch.int64)
    for start in range(0, len(W), GROUP):
        end = min(start + GROUP, len(W))
        errors = torch.empty_like(W[start:end])
        for j in range(start, end):
            indices[j] = _nearest(W[j] / S[j], values)
            errors[j - start] = (W[j] - values[indices[j]] * S[j]) / U[j, j]
            W[j + 1 : end] -= U[j, j + 1 : end, None] * errors[j - start]
        W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return indices[order.argsort()].T


def _scales(weight: Params4bit) -> Tensor:
    """(O, I) fp32 scale of each weight."""
    state = weight.quant_state
    return block_scales(state).repeat_interleave(state.blocksize)[: math.prod(state.shape)].view(state.shape)


def _nearest(weight: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of the ascending `values`."""
    return torch.bucketize(weight, (values[1:] + values[:-1]) / 2)


def _positive(scales: Tensor) -> Tensor:
    """Scales to divide by: a block of zeros has scale 0."""
    return scales.clamp(min=torch.finfo(torch.float32).tiny)


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """(I, I) upper triangular U with U^T U = (H + damping mean(diag H) 1)^-1."""
    mean = moment.diagonal().mean().item()
    if not math.isfinite(mean):
        raise InputError(
            "A layer's inputs are not finite on the calibration texts; choose others by --calibration."
        )
    while True:
        H = moment.clone()
        H.diagonal().add_(damping * mean or 1.0)  # no inputs: plain rounding to the nearest
        L, failed = torch.linalg.cholesky_ex(H)
        U, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed and not failed_too and U.isfinite().all():
            return U
        damping *= 10  # too near to singular for fp32


# ---- inputs of the layers ---------------------------------------------------------------------------------


@torch.inference_mode()
def input_moments(
    network: Any, layers: Sequence[str], texts: Sequence[Sequence[int]], limit: int = MOMENT_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Second moment of the inputs of each named layer, E x^T x over all tokens.

    Only as many as fit into `limit` bytes are collected per pass; each pass runs all texts again.

    Args:
        network: a causal LM that computes as the merged model should.
        texts: token ids.
    Yields:
        (layer, (I, I) fp32), in the order of `layers`.
    """
    modules: dict[str, Any] = {name: network.get_submodule(name) for name in layers}
    waiting = list(layers)
    while waiting:
        size = 0
        group: list[str] = []
        while waiting and (not group or size + 4 * modules[waiting[0]].in_features ** 2 <= limit):
            size += 4 * modules[waiting[0]].in_features ** 2
            group.append(waiting.pop(0))
        moments = {name: torch.zeros(modules[name].in_features, modules[name].in_features) for name in group}
        with _watch_inputs({name: modules[name] for name in group}, moments):
            for ids in texts:
                network.base_model(torch.tensor([ids]), use_cache=False)
        for name in group:
            yield name, moments.pop(name).div_(sum(map(len, texts)))


@contextmanager
def _watch_inputs(modules: Mapping[str, nn.Module], moments: dict[str, Tensor]) -> Iterator[None]:
    """Add x^T x of the modules' inputs to their moments."""

    def watch(moment: Tensor) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            moment.addmm_(x.T, x)

        return add

    handles = [module.register_forward_pre_hook(watch(moments[name])) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
