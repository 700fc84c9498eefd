"""Choose 4-bit codes by what a layer computes: of a base, and after a merge, so that the update survives.

A base W_hat lies on the grid of its 4-bit codes, and a fine-tuning update D is a few hundredths of a step of that
grid. Rounded to the nearest code, W_hat + D is W_hat again and the update is lost. But what matters is the layer's
output over the inputs it gets, not the weight:

    minimize over Q on the grid    E |x (Q - T)^T|^2  =  tr (Q - T) H (Q - T)^T        T = W_hat + D,  H = E x^T x

GPTQ (arXiv 2210.17323) rounds one input column after another and compensates each error in the columns still to
round, using the inputs' correlations. With H^-1 = U^T U (U upper triangular, the columns in rounding order, those
with the largest inputs first):

    q_j = nearest(w_j)        e = (w_j - q_j) / U_jj        w_k <- w_k - e U_jk    for all k > j

Outputs for which this is no better than plain rounding (an update too small to beat the noise) keep the nearest
codes. The scales stay those of the base unless the update outgrows them. `choose_codes` does the same for a base
itself, with scales that may clip the largest weights. Scales are used as dequantized (after
double quantization), so the errors fed back are those of the stored weight.

Shapes: O outputs, I inputs; W, T, Q (O, I); H (I, I), all fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.kernels.rounding import round_group
from qlora.quant.library import Params4bit
from qlora.quant.storage import packed_tensors, unpack_tensors
from qlora.quant.weight import block_scales, quantization_of, quantize_weight, with_scales
from qlora.system.errors import InputError

# Share of H's mean diagonal added to its diagonal. GPTQ's 0.01 hides the small inputs: a few features of the first
# token are hundreds of times larger than all others.
DAMPING = 1e-4
GROUP = 64  # columns rounded before the rest of the weight is updated
FACTORS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79)  # of a block's scale
SLAB = 2**22  # weights rounded at once: outputs are independent
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
    grid = Grid(base)
    if any((target[rows].abs() > OUTGROWN * grid.scales(rows)).any() for rows in grid.slabs()):
        grid = Grid(quantize_weight(target, quantization_of(base)))
    feedback = Feedback.of(moment, damping)
    chosen = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    for rows in grid.slabs():
        part, scales = target[rows], grid.scales(rows)
        rounded = round_with_feedback(part, scales, grid.values, feedback)
        nearest = _nearest(part / _positive(scales), grid.values)
        errors = [grid.values[indices.int()] * scales - part for indices in (rounded, nearest)]
        fed_back, plain = (((error @ moment) * error).sum(1, keepdim=True) for error in errors)
        chosen[rows] = torch.where(fed_back < plain, rounded, nearest)
    return grid.weight(chosen)


def choose_codes(target: Tensor, base: Params4bit, feedback: Feedback, unseen: Tensor) -> Params4bit | None:
    """The 4-bit weight closest to `target` in its layer's output, if it is closer than `base` on unseen inputs.

    Args:
        target: (O, I), the original weight.
        base: the same weight with the nearest codes.
        feedback: of the second moment of the layer's inputs.
        unseen: (N, I) fp32, other inputs.
    Returns:
        None if `base` is at least as good on the unseen inputs.
    """
    nearest = Grid(base)
    grid = Grid(rescaled(target, base, feedback.importance))
    chosen = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    errors = [0.0, 0.0]
    for rows in grid.slabs():
        part, scales = target[rows].float(), grid.scales(rows)
        chosen[rows] = round_with_feedback(part, scales, grid.values, feedback)
        weights = grid.values[chosen[rows].int()] * scales, nearest.weights(rows)
        for which, weight in enumerate(weights):
            errors[which] += float((unseen @ (weight - part).T).square().sum())
    return grid.weight(chosen) if errors[0] < errors[1] else None


def rescaled(target: Tensor, base: Params4bit, importance: Tensor) -> Params4bit:
    """`base` with the scales among `FACTORS` times its own that serve the nearest codes best, block by block.

    A scale below the largest weight of its block clips that one, and brings the levels closer to all others.

    Args:
        importance: (I,) weights of the squared errors.
    """
    grid, size = Grid(base), base.quant_state.blocksize
    if target.shape[1] % size:
        return base  # blocks run over the ends of rows
    chosen = torch.empty_like(grid.blocks)
    for rows in grid.slabs():
        part = target[rows].float().reshape(-1, size)
        blocks = slice(rows.start * target.shape[1] // size, rows.stop * target.shape[1] // size)
        each = importance.view(-1, size).repeat(rows.stop - rows.start, 1)
        best = torch.full((len(part),), math.inf, device=part.device)
        for factor in FACTORS:
            scales = grid.blocks[blocks, None] * factor
            nearest = grid.values[_nearest(part / _positive(scales), grid.values)] * scales
            error = ((nearest - part).square_() * each).sum(1)
            chosen[blocks] = torch.where(error < best, factor, chosen[blocks])
            best = torch.minimum(best, error)
    return with_scales(base, grid.blocks * chosen)


class Grid:
    """The values that a 4-bit weight (O, I) can take: its scales times the 16 values of its table.

    Codes are indices into the ascending values. Work goes by slabs of rows, to bound the temporaries in fp32.

    Attributes:
        values: (16,) fp32, ascending.
        blocks: (blocks,) fp32 scales.
    """

    def __init__(self, base: Params4bit) -> None:
        self.base, self.shape = base, tuple(base.quant_state.shape)
        # FP4's table is ordered by its bits
        self.values, self._order = base.quant_state.code.to(base.device).sort()
        self.blocks = block_scales(base.quant_state)

    def slabs(self) -> Iterator[slice]:
        height = max(2, SLAB // self.shape[1] // 2 * 2)  # two codes share a byte
        for start in range(0, self.shape[0], height):
            yield slice(start, min(start + height, self.shape[0]))

    def scales(self, rows: slice) -> Tensor:
        """(rows, I) fp32 scale of each weight."""
        size, width = self.base.quant_state.blocksize, self.shape[1]
        first, last = rows.start * width, rows.stop * width
        blocks = self.blocks[first // size : -(-last // size)].repeat_interleave(size)
        return blocks[first % size :][: last - first].view(-1, width)

    def weights(self, rows: slice) -> Tensor:
        """(rows, I) fp32, the base's own."""
        width = self.shape[1]
        first, last = rows.start * width, rows.stop * width
        packed = self.base.data.view(torch.uint8).flatten()[first // 2 : -(-last // 2)]
        stored = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: last - first]
        return self.base.quant_state.code.to(packed.device)[stored.int()].view(-1, width) * self.scales(rows)

    def weight(self, codes: Tensor) -> Params4bit:
        """The base with other codes, (O, I) uint8."""
        flat = self._order.to(torch.uint8)[codes.flatten().int()]
        if len(flat) % 2:
            flat = torch.cat([flat, flat.new_zeros(1)])
        packed = flat[::2] << 4 | flat[1::2]
        return unpack_tensors({**packed_tensors(self.base), "": packed.view_as(self.base.data)}, codes.device)


@dataclass(frozen=True)
class Feedback:
    """How the error of one column goes into the columns that are still to round.

    Attributes:
        order: (I,) int64, the columns in rounding order.
        U: (I, I) fp32 upper triangular, its columns in that order (see the module docstring).
        importance: (I,) root mean square of each input.
    """

    order: Tensor
    U: Tensor
    importance: Tensor

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> Feedback:
        """From the second moment (I, I) of a layer's inputs, fp32."""
        order = moment.diagonal().argsort(descending=True, stable=True)
        U = _inverse_factor(moment[order][:, order], damping)
        return cls(order, U, moment.diagonal().sqrt())


def round_with_feedback(target: Tensor, scales: Tensor, values: Tensor, feedback: Feedback) -> Tensor:
    """GPTQ on a given grid.

    Args:
        target, scales: (O, I) fp32; weight (o, i) can be any of scales[o, i] * values.
        values: (16,) fp32, ascending.
    Returns:
        (O, I) uint8 indices into `values`.
    """
    order, U = feedback.order, feedback.U
    # Transposed, to make a column of the layer's inputs contiguous.
    W, S = target.T[order], _positive(scales).T[order]
    indices = torch.empty_like(W, dtype=torch.uint8)
    for start in range(0, len(W), GROUP):
        end = min(start + GROUP, len(W))
        group = W[start:end], S[start:end], U[start:end, start:end], values
        indices[start:end], errors = round_group(*group) or round_group_plainly(*group)
        W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return indices[order.argsort()].T


def round_group_plainly(W: Tensor, S: Tensor, U: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`round_group` of kernels/rounding.py, in torch."""
    indices, errors = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)
    for j in range(len(W)):
        nearest = _nearest(W[j] / S[j], values)
        errors[j] = (W[j] - values[nearest] * S[j]) / U[j, j]
        W[j + 1 :] -= U[j, j + 1 :, None] * errors[j]
        indices[j] = nearest
    return indices, errors


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
        raise InputError("A layer's inputs are not finite on the calibration texts; choose other texts.")
    while True:
        H = moment.clone()
        H.diagonal().add_(damping * mean or 1.0)  # no inputs: plain rounding to the nearest
        L, failed = torch.linalg.cholesky_ex(H)
        del H  # each of these is as large as the layer's moment
        inverse = torch.cholesky_inverse(L)
        del L
        U, failed_too = torch.linalg.cholesky_ex(inverse, upper=True)
        del inverse
        if not failed and not failed_too and U.isfinite().all():
            return U.contiguous()
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
