"""The LLaMA decoder block with fused elementwise work: same numbers, fewer passes, less memory.

With x the residual stream (N, D), W' = W + s B A an adapted or plain frozen layer (lora/layer.py,
quant/weight.py), n_i RMSNorm and @ a product:

    y  = n1(x)                       q, k, v = y @ Wq', y @ Wk', y @ Wv'
    o  = attention(rotate(q), rotate(k), v) @ Wo'
    x2 = x + o                       z = n2(x2)
    gate, up = z @ Wgate', z @ Wup'
    x3 = x2 + (silu(gate) * up) @ Wdown'

Each step is an autograd function that keeps what it needs and recomputes the rest: the norms keep their input and
one number per row, attention q, k and v, SwiGLU gate and up. Their forward and backward formulas are in
kernels/fused.py, those of the products in lora/layer.py. y, z and the activation are kept if an adapted layer
reads them.

Under tensor parallelism (parallel/tensor_parallel.py) each process has some heads and some columns of the MLP, o
and the MLP's output are partial sums, and the residual stream may be split by tokens. The block's `exchange` does
the communication.

A recomputed block runs its MLP in slices of the tokens: model/slices.py.

`fuse_blocks` replaces transformers' own block by this one for families where it is known to compute the same
(model/families.py). With a key-value cache transformers' own still runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora.kernels import fused as kernels
from qlora.kernels.packed_attention import PackedAttention
from qlora.model.families import FAMILIES
from qlora.model.slices import mlp_in_slices
from qlora.system.errors import InputError


class Exchange:
    """Communication between the processes that compute a block together. This class: a single process, none.

    Tensors are (B, T, D). "Own tokens" are this process's under sequence parallelism, otherwise all.
    """

    def begin(self, hidden: Tensor) -> Tensor:
        """The block's input -> own tokens."""
        return hidden

    def enter(self, y: Tensor, length: int) -> Tensor:
        """Own tokens -> all, for layers split by rows; `length` is T of all."""
        return y

    def leave(self, o: Tensor) -> Tensor:
        """A partial sum of all tokens, from a layer split by columns -> the sum of own tokens."""
        return o

    def end(self, x: Tensor, length: int) -> Tensor:
        """Own tokens -> the block's output."""
        return x

    def collect(self, x: Tensor, length: int) -> Tensor:
        """The block's output -> all tokens."""
        return x


ALONE = Exchange()


class FusedBlock:
    """A block that runs `block_forward`: the base class that `fuse_blocks` adds to transformers' block.

    Attributes:
        exchange: set by tensor parallelism.
    """

    exchange: Exchange = ALONE


class AddNorm(torch.autograd.Function):
    """(x + delta, RMSNorm(x + delta)), with both gradients in one pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, r = kernels.add_norm(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, r)
        ctx.has_delta = delta is not None
        return total.detach() if delta is None else total, y

    @staticmethod
    def backward(ctx: Any, dsum: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, r = ctx.saved_tensors
        dx = kernels.norm_backward(dy.contiguous(), dsum.contiguous(), total, weight, r)
        dweight = None
        if ctx.needs_input_grad[2]:
            dweight = (dy.float() * (total.float() * r[:, None])).sum(0)
        return dx, dx if ctx.has_delta else None, dweight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; keeps only gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return kernels.swiglu_backward(dy.contiguous(), *ctx.saved_tensors)


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers that transformers can recompute, lowest first."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def fuse_blocks(network: nn.Module) -> None:
    """Give a transformers model's decoder blocks the forward above if their own computes the same."""
    blocks = {family.block for family in FAMILIES.values()}
    for module in list(network.modules()):
        if type(module).__name__ in blocks and not is_fused(module) and _is_plain(module):
            kind: Any = type(module)
            module.__class__ = _fused_class(kind)


def is_fused(block: nn.Module) -> bool:
    """Whether a decoder block runs `block_forward`."""
    return isinstance(block, FusedBlock)


def recomputes(block: Any) -> bool:
    """Whether a block's activations are recomputed in the backward pass of this call."""
    return block.gradient_checkpointing and block.training and torch.is_grad_enabled()


def exchange_of(block: nn.Module) -> Exchange:
    """A decoder block's exchange; for transformers' own block, which is never split, one that does nothing."""
    return block.exchange if isinstance(block, FusedBlock) else ALONE


def _is_plain(block: Any) -> bool:
    """Whether the activation is SiLU and the attention has no dropout."""
    attention = block.self_attn
    return type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") and not attention.attention_dropout


@cache
def _fused_class(plain: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs.get("past_key_values") is not None:
            if self.exchange is not ALONE:
                raise InputError("A model split by --tensor-parallel only trains; answer with the whole one.")
            return plain.forward(self, hidden_states, *args, **kwargs)
        return block_forward(self, hidden_states, kwargs)

    # transformers wraps the forward of every subclass in its gradient checkpointing
    return type(plain.__name__, (plain, FusedBlock), {"forward": forward, "__module__": plain.__module__})


def block_forward(block: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(B, T, D) -> (B, T, D); `kwargs` as transformers passes them to its block."""
    exchange: Exchange = block.exchange
    first, second, mlp = block.input_layernorm, block.post_attention_layernorm, block.mlp
    batch, length = hidden.shape[0], kwargs["position_embeddings"][0].shape[1]
    hidden = exchange.begin(hidden)
    own = hidden.shape
    x = hidden.reshape(-1, own[-1])
    x, y = AddNorm.apply(x, None, first.weight, first.variance_epsilon)
    o = _attend(block.self_attn, exchange.enter(y.view(own), length), kwargs)
    o = exchange.leave(o.reshape(batch, -1, own[-1]))
    x, z = AddNorm.apply(x, o.reshape(x.shape), second.weight, second.variance_epsilon)
    z = exchange.enter(z.view(own), length).flatten(0, 1)
    down = mlp_in_slices(mlp_forward, mlp, z) if recomputes(block) else mlp_forward(mlp, z)
    x = x.view(own) + exchange.leave(down.view(batch, -1, own[-1]))  # no view itself: FSDP2 hooks the output
    return exchange.end(x, length)


def mlp_forward(mlp: Any, z: Tensor) -> Tensor:
    """(N, D) -> (N, D)."""
    down: Tensor = mlp.down_proj(SwiGLU.apply(mlp.gate_proj(z), mlp.up_proj(z)))
    return down


def _attend(attention: Any, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Attention: fused kernels for packed sequences on a CPU, else transformers and qlora/model/attention.py."""
    bounds = kwargs.get("cu_seq_lens_q")
    cosine, sine = kwargs["position_embeddings"]
    fused = bounds is not None and kernels.kernel("attention", y) is not None
    if not fused or cosine.shape[-1] != attention.head_dim or attention.head_dim % 16:
        return attention(hidden_states=y, **kwargs)[0]
    y = y[0]
    q, k, v = attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)
    if hasattr(attention, "q_norm"):
        q = attention.q_norm(q.view(len(y), -1, attention.head_dim)).view(len(y), -1)
        k = attention.k_norm(k.view(len(y), -1, attention.head_dim)).view(len(y), -1)
    # Qwen has a window per layer, None for full attention; Mistral has one in its config.
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)) or len(y)
    o = PackedAttention.apply(
        q,
        k,
        v,
        cosine[0].contiguous(),
        sine[0].contiguous(),
        bounds,
        attention.head_dim,
        attention.scaling,
        window,
    )
    return attention.o_proj(o)
