"""Cross-entropy of the next token, without the (N, V) logits.

For supervised position i with hidden state h_i (D) and target t_i, with W (V, D) the frozen output head:

    z_i = W h_i        loss_i = -log_softmax(z_i)[t_i]        dloss_i / dh_i = (softmax(z_i) - e_{t_i}) W

The gradient needs the same logits as the loss, so both are computed in one pass, a chunk of rows at a time:
a chunk's logits die before the next chunk's are made, and the backward pass only scales what was stored
(n, D). Positions without a target never reach the head. N all positions, n supervised, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.attention import packed_arguments
from qlora.errors import InputError
from qlora.packing import Batch
from qlora.tokenize import IGNORE_INDEX

CHUNK_SIZE = 1024  # supervised positions whose logits exist at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss sum and its gradient in one pass; formulas in the module docstring."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        weight = weight.to(hidden.dtype)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            log_p = torch.log_softmax(hidden[rows] @ weight.T, dim=1, dtype=torch.float32)
            target = targets[rows, None]
            loss -= log_p.gather(1, target).sum()
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                torch.mm(p.to(hidden.dtype), weight, out=gradient[rows])
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        return ctx.gradient * dloss.to(ctx.gradient.dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, int]:
    """Sum of next-token cross-entropy over the supervised positions.

    Args:
        hidden: (N, D) final hidden states, bf16 or fp32.
        weight: (V, D) output head, frozen, any float dtype.
        targets: (N,) int64, already shifted; IGNORE_INDEX is left out.
        chunk_size: positions whose logits exist at a time.
    Returns:
        (loss_sum, num_targets): fp32 scalar in nats, connected to `hidden` even when every target is
        masked (then 0 with a gradient of zeros); number of supervised positions.
    Raises:
        ValueError: hidden and targets disagree on N, or the head wants a gradient.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} positions but targets {targets.shape[0]}.")
    if weight.requires_grad:
        raise ValueError("The output head wants a gradient, which this loss does not compute; freeze it.")
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    loss = _LinearCrossEntropy.apply(hidden[positions], weight, targets[positions], chunk_size)
    return loss, positions.numel()


def causal_lm_loss(model: Any, batch: Batch, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, int]:
    """Loss sum of one micro-batch through a transformers causal LM.

    Returns:
        (loss_sum, num_targets) as `linear_cross_entropy`.
    Raises:
        InputError: the model changes its logits after the head, which the chunked loss would miss.
    """
    config: Any = model.config
    for field, neutral in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
        if getattr(config, field, neutral) != neutral:
            raise InputError(f"A {config.model_type} model sets {field}, which training does not support.")
    arguments: dict[str, Any] = {}
    if batch.cu_seqlens is not None:
        if config._attn_implementation != "qlora_packed":
            raise ValueError(
                f"Packed rows need block-diagonal attention, but the model uses {config._attn_implementation!r}; "
                "load it with load_base_model, or pass --no-packing."
            )
        arguments = packed_arguments(batch.cu_seqlens, batch.max_length)
    output = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **arguments
    )
    hidden = output.last_hidden_state
    return linear_cross_entropy(
        hidden.flatten(0, 1), model.get_output_embeddings().weight, batch.targets.flatten(), chunk_size
    )
