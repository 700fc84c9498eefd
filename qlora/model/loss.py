"""Cross-entropy of the next token, without the (N, V) logits.

For supervised position i with hidden state h_i (D) and target t_i, with W (V, D) the output head and m a scale
(1; Cohere and Granite have another):

    z_i = m W h_i        loss_i = -log_softmax(z_i)[t_i]        g_i = dloss_i / dz_i = softmax(z_i) - e_{t_i}

    dloss_i / dh_i = m W^T g_i        dloss / dW = sum over i of m g_i h_i^T, only where the head trains

Gemma 2 caps its logits: z_i = c tanh(m W h_i / c), and g_i is multiplied by dz / d(m W h) = 1 - (z_i / c)^2.

The gradients need the same logits as the loss, so both are computed in one pass, a chunk of rows at a time:
a chunk's logits are freed before the next chunk's are made, and the backward pass only scales what was stored:
(n, D), and (V, D) in fp32 for a head that trains. Positions without a target never reach the head. N all
positions, n supervised, D hidden, V vocabulary.

A mixture of experts adds the Switch Transformer's load-balancing loss (arXiv 2101.03961, equations 4 to 6): with
f_e the share of (token, layer) pairs that chose expert e, counted K times where K experts are chosen, and P_e the
mean probability that the router gave it, over E experts

    balance = E sum over e of f_e P_e        f has no gradient; balance is K if all experts are used equally
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.data.batches import Batch
from qlora.data.example import IGNORE_INDEX
from qlora.kernels.fused import cross_entropy
from qlora.kernels.gemm import multiply_16bit
from qlora.model.attention import packed_arguments
from qlora.model.experts import count_choices
from qlora.system.errors import InputError
from qlora.system.memory import trim_heap

CHUNK_SIZE = 256  # supervised positions whose logits exist at once


class _HeadChunks:
    """The losses and gradients g of a head's rows, a chunk at a time; all chunks share one buffer of logits.

    Args:
        hidden: (n, D); head: (V, D); targets: (n,) int64; the others as for `linear_cross_entropy`.
        options: chunk_size, scale, softcap.
    """

    def __init__(
        self, hidden: Tensor, head: Tensor, targets: Tensor, options: tuple[int, float, float | None]
    ) -> None:
        self.hidden, self.weight, self.targets = hidden, head.detach(), targets
        self.chunk_size, self.scale, self.softcap = options
        self.buffer = hidden.new_empty(min(self.chunk_size, len(targets)), len(head))

    def times_head(self, rows: Tensor, out: Tensor, backward: bool = False) -> Tensor:
        product = multiply_16bit(rows, self.weight, None, backward, out)
        if product is None:
            if self.weight.dtype != rows.dtype and self.weight.device.type == "cpu":
                trim_heap()  # frees the layers' temporaries before a copy of the head
            self.weight = self.weight.to(rows.dtype)
            product = torch.mm(rows, self.weight if backward else self.weight.T, out=out)
        return product

    def __call__(self, needs_gradient: bool, trains_head: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their losses (n,) fp32, g (n, V) in the logits' dtype, or in fp32 where they are not plain)."""
        for start in range(0, len(self.targets), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            target = self.targets[rows]
            logits = self.times_head(self.hidden[rows], self.buffer[: len(target)])
            if not trains_head and self.scale == 1 and self.softcap is None:
                yield rows, *cross_entropy(logits, target)
                continue
            if self.scale != 1:
                logits *= self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            losses = -log_p.gather(1, target[:, None])[:, 0]
            if not needs_gradient:
                yield rows, losses, logits
                continue
            g = log_p.exp_()
            g.scatter_add_(1, target[:, None], g.new_full((len(g), 1), -1.0))
            if self.softcap is not None:
                g *= 1 - (logits.float() / self.softcap) ** 2
            if self.scale != 1:
                g *= self.scale
            yield rows, losses, g


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss sum and its gradients in one pass; formulas in the module docstring."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, *options: Any) -> Tensor:  # type: ignore[override]
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = _HeadChunks(hidden, head, targets, options)  # type: ignore[arg-type]
        for rows, losses, g in chunks(dhidden is not None or dhead is not None, dhead is not None):
            loss += losses.sum()
            if dhidden is not None:
                chunks.times_head(g.to(hidden.dtype), dhidden[rows], backward=True)
            if dhead is not None:
                dhead.addmm_(g.T, hidden[rows].float())
        # Freed as soon as they are used; an attribute would live as long as the graph.
        ctx.save_for_backward(dhidden, dhead)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dhidden, dhead = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * dloss.to(dhidden.dtype)
        dhead = None if dhead is None else dhead * dloss
        return dhidden, dhead, None, None, None, None


class _TokenCrossEntropy(torch.autograd.Function):
    """Each row's loss in one pass, and its gradient to the hidden states before its factor is known.

    Row i's loss alone depends on h_i, so the backward pass multiplies row i of what was stored by dloss_i. A head
    that trains sums over rows, so its gradient waits for the factors: the chunks' logits are computed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, *options: Any) -> Tensor:  # type: ignore[override]
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        chunks = _HeadChunks(hidden, head, targets, options)  # type: ignore[arg-type]
        for rows, losses, g in chunks(dhidden is not None, False):
            found[rows] = losses
            if dhidden is not None:
                chunks.times_head(g.to(hidden.dtype), dhidden[rows], backward=True)
        ctx.options = options
        ctx.save_for_backward(dhidden, *((hidden, head, targets) if ctx.needs_input_grad[1] else ()))
        return found

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dhidden, *saved = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * dlosses[:, None].to(dhidden.dtype)
        dhead = None
        if saved:
            hidden, head, targets = saved
            dhead = torch.zeros_like(head, dtype=torch.float32)
            for rows, _, g in _HeadChunks(hidden, head, targets, ctx.options)(True, True):
                dhead.addmm_((g * dlosses[rows, None]).T, hidden[rows].float())
        return dhidden, dhead, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int = CHUNK_SIZE,
    scale: float = 1.0,
    softcap: float | None = None,
    num_targets: int | None = None,
) -> tuple[Tensor, int]:
    """Sum of next-token cross-entropy over the supervised positions.

    Args:
        hidden: (N, D) final hidden states, bf16 or fp32.
        weight: (V, D) output head, any float dtype; its gradient, if required, is accumulated in fp32.
        targets: (N,) int64, already shifted; IGNORE_INDEX is skipped.
        chunk_size: positions whose logits exist at once.
        scale: multiplies the logits.
        softcap: largest magnitude c of a logit, z -> c tanh(z / c); its derivative is 1 - (capped z / c)^2.
        num_targets: supervised positions, if known; None: they are counted.
    Returns:
        (loss_sum, num_targets): fp32 scalar in nats, connected to `hidden` even when every target is
        masked (then 0 with a gradient of zeros); number of supervised positions.
    Raises:
        ValueError: hidden and targets disagree on N.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[0]} positions but targets {targets.shape[0]}.")
    positions = target_positions(targets, num_targets)
    loss = _LinearCrossEntropy.apply(hidden[positions], weight, targets[positions], chunk_size, scale, softcap)
    return loss, positions.numel()


def target_positions(targets: Tensor, count: int | None) -> Tensor:
    """(count,) int64: where targets (N,) are supervised. On CUDA the host waits for the device without a count."""
    supervised = targets != IGNORE_INDEX
    found = supervised.nonzero() if count is None else supervised.nonzero_static(size=count)
    return found.squeeze(1)


def head_cross_entropy(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    chunk_size: int = CHUNK_SIZE,
    num_targets: int | None = None,
) -> tuple[Tensor, int]:
    """`linear_cross_entropy` of a model's head, which may have an adapter: then W h is the layer's own product.

    The logits of a chunk are computed again for its gradients, so that again only one chunk's exist.
    """
    if not head.is_adapted:
        return linear_cross_entropy(
            hidden, head.weight, targets, chunk_size, head.scale, head.softcap, num_targets
        )

    def chunk_loss(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(states), wanted, reduction="sum")

    positions = target_positions(targets, num_targets)
    states, wanted = hidden[positions], targets[positions]
    loss = states.sum(dtype=torch.float32) * 0  # keeps the graph when every target is masked
    for start in range(0, len(wanted), chunk_size):
        rows = slice(start, start + chunk_size)
        loss = loss + checkpoint(chunk_loss, states[rows], wanted[rows], use_reentrant=False)
    return loss, positions.numel()


def token_cross_entropy(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    chunk_size: int = CHUNK_SIZE,
    num_targets: int | None = None,
) -> Tensor:
    """(n,) fp32: the cross-entropy of each supervised position, each with its own factor in the backward pass.

    The arguments are those of `head_cross_entropy`, whose loss is the sum.
    """
    positions = target_positions(targets, num_targets)
    states, wanted = hidden[positions], targets[positions]
    if not head.is_adapted:
        losses: Tensor = _TokenCrossEntropy.apply(
            states, head.weight, wanted, chunk_size, head.scale, head.softcap
        )
        return losses

    def chunk_losses(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(states), wanted, reduction="none")

    parts = [
        checkpoint(chunk_losses, *part, use_reentrant=False)
        for part in zip(states.split(chunk_size), wanted.split(chunk_size), strict=True)
    ]
    return torch.cat(parts) if len(wanted) else states.sum(dim=1, dtype=torch.float32)


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, real: Tensor | None = None) -> Tensor:
    """E sum of f_e P_e over all layers together; formula in the module docstring.

    Args:
        router_logits: per layer (N, E).
        top_k: experts that each token chooses.
        real: (n,) int64, the positions that are not padding; None: all.
    Returns:
        fp32 scalar; `top_k` if all experts are used equally.
    """
    num_experts = router_logits[0].shape[-1]
    kept = router_logits if real is None else [logits[real] for logits in router_logits]
    p = torch.cat([logits.float().softmax(dim=-1) for logits in kept])
    chosen = p.detach().topk(top_k, dim=-1).indices.flatten()
    f = count_choices(chosen, num_experts) / len(p)
    return num_experts * (f * p.mean(dim=0)).sum()


@dataclass(frozen=True)
class OutputHead:
    """Turns hidden states into logits: z = softcap * tanh(scale * W h / softcap), or scale * W h.

    Attributes:
        weight: (V, D) W, without an adapter's update.
        layer: computes W h; with an adapter W is W + s B A.
        is_adapted: whether it has an adapter, so that `weight` alone is not the head.
    """

    weight: Tensor
    scale: float
    softcap: float | None
    layer: Any
    is_adapted: bool = False

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V) fp32."""
        product = self.layer(hidden) if self.is_adapted else hidden @ self.weight.to(hidden.dtype).T
        logits = product.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_layer(model: Any) -> Any:
    """The layer with the head's weight, inside of an adapter's wrapper; None: the model has no head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return getattr(head, "base_layer", head)


def output_head(model: Any) -> OutputHead:
    """The head of a transformers causal LM.

    Raises:
        InputError: it has a bias, which the chunked loss would ignore.
    """
    config, layer = model.config, model.get_output_embeddings()
    head = head_layer(model)
    if getattr(head, "bias", None) is not None:
        raise InputError(f"A {config.model_type} model's output head has a bias; that is not supported.")
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(head.weight, scale, softcap, layer, is_adapted=getattr(layer, "lora", None) is not None)


@contextmanager
def gathered_head(model: Any) -> Iterator[OutputHead]:
    """`output_head`, gathered within the `with` block if the base is sharded (parallel/fsdp.py)."""
    owner = model.get_input_embeddings() if model.config.tie_word_embeddings else head_layer(model)
    if not hasattr(owner, "unshard"):
        yield output_head(model)
        return
    owner.unshard()
    try:
        yield replace(output_head(model), weight=owner.weight)
    finally:
        owner.reshard()


def target_log_likelihoods(
    hidden: Tensor, head: OutputHead, targets: Tensor, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """log p of each target, without gradients and without the (n, V) logits.

    Args:
        hidden: (n, D) final hidden states, one per target; states may repeat.
        targets: (n,) int64.
    Returns:
        ((n,) fp32 in nats, (n,) bool: whether the target is the likeliest token, the first of equals).
    """
    head = replace(head, weight=head.weight.to(hidden.dtype))
    log_p = torch.empty(len(targets), device=hidden.device)
    is_greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(targets), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = head.logits(hidden[rows])
        is_greedy[rows] = logits.argmax(dim=1) == targets[rows]
        log_p[rows] = logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(dim=1)
    return log_p, is_greedy


def attention_arguments(model: Any, batch: Batch) -> dict[str, Any]:
    """Arguments that make the attention of a packed batch block-diagonal; none for a padded one."""
    if batch.cu_seqlens is None:
        return {}
    implementation = model.config._attn_implementation
    if implementation != "qlora_packed":
        raise ValueError(
            f"Packed rows need block-diagonal attention, but the model uses {implementation!r}; "
            "load it with load_base_model, or pass --no-packing."
        )
    return packed_arguments(batch.cu_seqlens, batch.max_length)


def _run_base(model: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(hidden states (positions, D), `load_balancing_loss` of a mixture of experts that trains)."""
    arguments = attention_arguments(model, batch)
    coefficient = getattr(model.config, "router_aux_loss_coef", None) if model.training else None
    if coefficient:
        arguments["output_router_logits"] = True
    output = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **arguments
    )
    hidden = output.last_hidden_state.flatten(0, 1)
    if not coefficient or not getattr(output, "router_logits", None):
        return hidden, None
    real = None
    if batch.cu_seqlens is None:  # padded
        lengths = torch.tensor([len(row) for row in batch.sequences], device=hidden.device)
        mask = torch.arange(batch.input_ids.shape[1], device=hidden.device) < lengths[:, None]
        real = mask.flatten().nonzero_static(size=batch.num_tokens).squeeze(1)
    return hidden, load_balancing_loss(output.router_logits, model.config.num_experts_per_tok, real)


def causal_lm_loss(model: Any, batch: Batch, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, int]:
    """Loss sum of one micro-batch through a transformers causal LM.

    While a mixture of experts trains (`model.training`), the sum has one more term,

        router_aux_loss_coef x load_balancing_loss of the micro-batch's real tokens x num_targets

    so that a step's sum over micro-batches, divided by its number of targets, is the mean cross-entropy plus the
    coefficient times the micro-batches' mean balance, weighted by their targets. The balance is per micro-batch:
    it is the only term in which 1 x 8 and 2 x 4 examples differ. Held-out losses omit it.

    Returns:
        (loss_sum, num_targets) as `linear_cross_entropy`.
    Raises:
        InputError: the model's head has a bias, which the chunked loss would ignore.
    """
    hidden, balance = _run_base(model, batch)
    with gathered_head(model) as head:
        targets = batch.targets.flatten()
        loss, num_targets = head_cross_entropy(hidden, head, targets, chunk_size, batch.num_targets)
    if balance is not None:
        loss = loss + model.config.router_aux_loss_coef * num_targets * balance
    return loss, num_targets


def sequence_log_likelihoods(
    model: Any, batch: Batch, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor | float]:
    """log p of the targets of each sequence, with gradients where the model trains.

    Returns:
        ((S,) fp32 in nats, the balance of a mixture of experts that trains, times its coefficient; else 0).
    Raises:
        InputError: as `causal_lm_loss`.
    """
    hidden, balance = _run_base(model, batch)
    with gathered_head(model) as head:
        losses = token_cross_entropy(hidden, head, batch.targets.flatten(), chunk_size, batch.num_targets)
    counts = [row.num_targets for row in batch.sequences]
    log_p = -torch.stack([part.sum() for part in losses.split(counts)])
    return log_p, 0.0 if balance is None else model.config.router_aux_loss_coef * balance
