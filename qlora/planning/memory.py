"""How much memory a run needs, by arithmetic alone, and how many layers' activations it can therefore keep.

Per token and layer the backward pass keeps, with D hidden, Q = heads x head_dim, K = kv_heads x head_dim, F the
MLP's width and c the bytes of the compute dtype,

    in the fused block (model/block.py)             in transformers' own
    c 2 D           the two norms' inputs     8 D               the same, in fp32
    c (Q + 2 K)     q, k, v                   c (2 Q + 2 K)     and the attention's output
    c 2 F           gate and up               c 3 F             and the activation

and in both, for layers with an adapter: c D, the input of q, k, v; the same for gate and up; c Q, of o; c F, of
down. Each adapter itself (lora/layer.py) keeps h, c R; under dropout a mask, a byte for each input; under DoRA z,
c for each output (`adapter_bytes`, as a mean over the layers).

A token in a mixture of experts meets K of them: F is K times the width of one (and the shared expert's), and K
outputs, c K D, wait for the router's weights. Norms of each head's q and k (Qwen 3) add 4 (Q + K), norms behind
attention and MLP (Gemma 2 and 3) 8 D. Scores that are written out (Gemma 2's soft-capped attention) are not
counted: a few times c x heads x the length of the token's sequence.

Where T ranks compute each layer together (tensor parallel), Q, K and F are those of one rank, a T-th; where they
divide the norms by tokens, too (sequence parallel), so is what the norms and a recomputed layer keep. What reads
their outputs, A of q, k, v, gate and up, keeps all of them.

Layers below the first one that trains anything keep nothing. A recomputed layer keeps only its input, c D. The
lowest are recomputed: the backward pass comes to them when the others' activations are gone, so that the one layer
it then holds in full takes no memory of its own. Beside all this, one layer at a time is differentiated: the
gradients of what it keeps take as much again at most, and one of its weights is there in the compute dtype.

The plan is of live tensors. A process takes more: Python and the libraries (about 0.4 GiB with torch, transformers
and accelerate on Linux), on a GPU the CUDA context, and what an allocator keeps of freed memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.lora.adapter import lora_layers
from qlora.lora.full_parameters import replaced_parameters
from qlora.model.attention import head_counts
from qlora.model.block import decoder_layers, is_fused
from qlora.model.families import family_of, known_layers
from qlora.model.loss import CHUNK_SIZE
from qlora.parallel.divisibility import split_axis
from qlora.quant.layers import logical_sizes
from qlora.quant.parts import local
from qlora.system.memory import GIB

FREE_SHARE = 0.5  # of the free memory that a run may take beside its base, unless a budget is given


@dataclass
class MemoryPlan:
    """Bytes of one device by component.

    Attributes:
        gradients: of what trains.
        activations: what the backward pass keeps.
        logits: a chunk's, with their gradient, and the output head in the compute dtype.
        workspace: of the layer that is being differentiated.
        communication: what other ranks' parts need beside this (planning/devices.py); none on one device.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    communication: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        shown = {name: size for name, size in vars(self).items() if size or name != "communication"}
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in shown.items())
        return f"{self.total / GIB:.2f} GiB planned ({parts})"


def layer_bytes(
    config: Any,
    dtype: torch.dtype,
    adapted: Collection[str] = ("q_proj", "v_proj"),
    fused: bool = False,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
) -> int:
    """Bytes that one decoder layer keeps of one token, by the module's formula.

    Args:
        adapted: last names of the layers with an adapter.
        fused: whether the layer computes as model/block.py.
        tensor_parallel, sequence_parallel: T, and whether the norms' tokens are divided by it, too.
    """
    family = family_of(config)
    (heads, kv_heads, head_dim), hidden, c = head_counts(config), config.hidden_size, dtype.itemsize
    queries, keys = heads * head_dim, kv_heads * head_dim
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    inputs = hidden * (not known_layers("qkv").isdisjoint(adapted))
    inputs += hidden * (not known_layers("mlp_in").isdisjoint(adapted))
    inputs += mlp // tensor_parallel * (not known_layers("mlp_out").isdisjoint(adapted))
    experts = getattr(config, "num_experts_per_tok", None) or 0  # a token's
    if experts:
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        mlp = experts * (getattr(config, "moe_intermediate_size", None) or mlp) + shared
    queries, keys, mlp = queries // tensor_parallel, keys // tensor_parallel, mlp // tensor_parallel
    stream = hidden // tensor_parallel if sequence_parallel else hidden
    norms = 4 * (queries + keys) * family.head_norms
    inputs += queries * ("o_proj" in adapted)
    if fused:
        return norms + c * (inputs + 2 * stream + queries + 2 * keys + 2 * mlp)
    norms += 8 * stream * (2 if family.post_norms else 1)
    if family.keeps_gelu:
        mlp = mlp * 4 // 3
    return norms + c * (inputs + 2 * queries + 2 * keys + 3 * mlp + experts * hidden)


def adapter_bytes(model: nn.Module, dtype: torch.dtype, tensor_parallel: int = 1) -> int:
    """Bytes that all adapted layers keep of one token, beside their inputs: h, dropout's mask and DoRA's z."""
    kept = 0
    for name, layer in lora_layers(model).items():
        ranks = tensor_parallel if split_axis(name) == 1 else 1
        weights = layer.weights
        kept += weights.rank * dtype.itemsize + layer.in_features // ranks * (weights.dropout > 0)
        kept += 0 if weights.variant is None else weights.variant.token_bytes(layer, dtype.itemsize)
    return kept


def activation_bytes(layer: int, layer_input: int, num_tokens: int, num_layers: int, recomputed: int = 0) -> int:
    """Bytes that `num_tokens` tokens of one micro-batch leave for the backward pass.

    Args:
        layer, layer_input: bytes of a token in a kept layer (`layer_bytes`), and of what a recomputed one keeps.
        num_layers: layers that keep anything, of which the lowest `recomputed` keep their input alone.
    """
    return num_tokens * (recomputed * layer_input + max(num_layers - recomputed, 1) * layer)


def differentiated_layers(model: nn.Module) -> list[Any]:
    """The decoder layers from the first with anything that trains: those below keep no activations."""
    layers = decoder_layers(model)
    number_of = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters()}
    first = next((p for p in model.parameters() if p.requires_grad), None)  # in the order of computation
    return layers[number_of.get(id(first), 0) :]


def choose_recomputed(mode: str, totals: Sequence[int], limit: int) -> int:
    """How many of the lowest layers to recompute.

    Args:
        mode: "on" all, "off" none, "auto" as few as make the plan fit, all where none does.
        totals: planned bytes with 0, 1, ... all layers recomputed.
        limit: bytes that the run may take.
    """
    every = len(totals) - 1
    if mode != "auto":
        return every if mode == "on" else 0
    return next((number for number, total in enumerate(totals) if total <= limit), every)


def moment_bytes(parameter: Tensor, optim: str) -> int:
    """Bytes of AdamW's two moments: in fp32, or (8 bits) a byte each and an fp32 scale for every 256.

    bitsandbytes keeps those of fewer than 4,096 values in 32 bits.
    """
    size = parameter.numel()
    if optim == "paged_adamw_8bit" and size >= 4096:
        return 2 * (size + 4 * -(-size // 256))
    return 8 * size


def plan_recomputing(
    model: nn.Module,
    num_tokens: int,
    dtype: torch.dtype,
    chunk_size: int = CHUNK_SIZE,
    optim: str = "adamw",
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
) -> list[MemoryPlan]:
    """The plans of a run with this model, adapters in place, with 0, 1, ... all layers recomputed.

    The model may be loaded (`load_base_model`) or on the meta device (`plan_base_model`): only shapes and dtypes
    are looked at. The optimizer counts fp32 masters of bf16 adapters and two moments; gradients, the head's of one
    micro-batch beside the sum, where the head trains. The base keeps what an adapter's copies stand for.

    Args:
        num_tokens: of a micro-batch.
        chunk_size: positions whose logits exist at a time.
        optim: kind of optimizer; a paged one's moments count, wherever the driver may put them.
        tensor_parallel, sequence_parallel: as for `layer_bytes`. The base is counted whole all the same, and so is
            the model expected to be (planning/devices.py divides its plan).
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
    layers = differentiated_layers(model)
    fused = bool(layers) and is_fused(layers[0])
    layer = layer_bytes(config, dtype, adapted, fused, tensor_parallel, sequence_parallel)
    layer += -(-adapter_bytes(model, dtype, tensor_parallel) // max(1, len(layers)))
    layer_input = dtype.itemsize * config.hidden_size // (tensor_parallel if sequence_parallel else 1)
    head_copy = 0 if head is None or head.weight.dtype == dtype else head.weight.numel() * dtype.itemsize
    largest = max((size for block in layers for _, size in logical_sizes(block)), default=0)
    plan = MemoryPlan(
        base=sum(local(p).numel() * p.itemsize for p in frozen) + statistics,
        adapters=sum(p.numel() * p.itemsize for p in trainable),
        gradients=4 * (count + head_size),
        optimizer=masters + sum(moment_bytes(p, optim) for p in trainable),
        activations=0,
        logits=min(chunk_size, num_tokens) * config.vocab_size * (4 + dtype.itemsize) + head_copy,
        workspace=num_tokens * layer + largest // tensor_parallel * dtype.itemsize,
    )
    kept = [activation_bytes(layer, layer_input, num_tokens, len(layers), n) for n in range(len(layers) + 1)]
    return [replace(plan, activations=number) for number in kept]


def default_limit(plan: MemoryPlan, free: int) -> int:
    """Bytes that a run takes at most without a budget: what is loaded, and a share of what is then free."""
    return plan.base + plan.adapters + int(FREE_SHARE * free)
