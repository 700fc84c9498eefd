"""How much memory a run needs, by arithmetic alone.

Per token and layer of a LLaMA block, with D hidden, Q = heads x head_dim, K = kv_heads x head_dim, F the MLP
width and c the bytes of the compute dtype, the backward pass keeps:

    8 D                            the two norms' inputs, in fp32
    c (2 Q + 2 K + 3 F)            q, k, v and the attention's output; gate, its activation and up
    c D                            input of adapted q, k, v; the same again for adapted gate, up
    c F                            input of an adapted down

A token in a mixture of experts meets K of them: F is K times the width of one (and the shared expert's), and K
outputs, c K D, wait for the router's weights. Under checkpointing a layer keeps only its input, c D, and one layer
at a time is held in full. Scores that are written out (Gemma 2's soft-capped attention) are not counted: a few
times c x heads x the length of the token's sequence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from qlora.device import GIB
from qlora.injection import lora_layers
from qlora.trained import replaced_parameters

CHECKPOINTING_SHARE = 0.5  # of the free memory that activations may take before layers are recomputed


@dataclass
class MemoryPlan:
    """Bytes of one device by component."""

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.2f} GiB planned ({parts})"


def activation_bytes(
    config: Any,
    num_tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
    adapted: Collection[str] = ("q_proj", "v_proj"),
) -> int:
    """Bytes that `num_tokens` tokens of one micro-batch leave for the backward pass.

    Args:
        adapted: last names of the layers with an adapter.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    inputs = hidden * (not {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"}.isdisjoint(adapted))
    inputs += hidden * (not {"gate_proj", "up_proj", "gate_up_proj", "c_fc"}.isdisjoint(adapted))
    inputs += mlp * (not {"down_proj", "c_proj"}.isdisjoint(adapted))
    experts = getattr(config, "num_experts_per_tok", None) or 0  # a token's
    if experts:
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        mlp = experts * (getattr(config, "moe_intermediate_size", None) or mlp) + shared
    layer = 8 * hidden + dtype.itemsize * (inputs + 2 * queries + 2 * keys + 3 * mlp + experts * hidden)
    if checkpointing:
        return num_tokens * (layers * dtype.itemsize * hidden + layer)
    return num_tokens * layers * layer


def wants_checkpointing(mode: str, needed: int, available: int) -> bool:
    """Resolve "auto": recompute only if `needed` bytes of activations are over half of the `available` ones."""
    if mode != "auto":
        return mode == "on"
    return needed > CHECKPOINTING_SHARE * available


def plan_memory(
    model: torch.nn.Module, num_tokens: int, dtype: torch.dtype, checkpointing: bool, chunk_size: int = 1024
) -> MemoryPlan:
    """The plan of a run with this model (loaded, adapters in place) and micro-batches of `num_tokens`.

    The optimizer counts fp32 masters of bf16 adapters and two fp32 moments; gradients, the head's of one
    micro-batch beside the sum, where the head trains. The base keeps what an adapter's copies stand for.
    """
    adapted = {name.rpartition(".")[2] for name in lora_layers(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    replaced = {id(p): p for p in replaced_parameters(model).values()}
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(replaced.values())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_size = head.weight.numel() if head is not None and head.weight.requires_grad else 0
    states = [p.quant_state for p in frozen if hasattr(p, "quant_state")]
    statistics = sum(s.absmax.numel() * s.absmax.itemsize for s in states)
    statistics += sum(4 * s.state2.absmax.numel() for s in states if s.nested)
    count = sum(p.numel() for p in trainable)
    masters = sum(4 * p.numel() for p in trainable if p.dtype != torch.float32)
    config: Any = model.config
    return MemoryPlan(
        base=sum(p.numel() * p.itemsize for p in frozen) + statistics,
        adapters=sum(p.numel() * p.itemsize for p in trainable),
        gradients=4 * (count + head_size),
        optimizer=masters + 8 * count,
        activations=activation_bytes(config, num_tokens, dtype, checkpointing, adapted),
        logits=min(chunk_size, num_tokens) * config.vocab_size * (4 + dtype.itemsize),
    )
