"""Calculate the memory of a run, and how many layers can keep their activations.

Per token and layer the forward pass saves for the backward pass, with D hidden, Q = heads x head_dim, K = kv_heads
x head_dim, F the MLP's width and c the bytes of the compute dtype,

    in the fused block (model/block.py)             in transformers' own
    c 2 D           the two norms' inputs     8 D               the same, in fp32
    c (Q + 2 K)     q, k, v                   c (2 Q + 2 K)     and the attention's output
    c 2 F           gate and up               c 3 F             and the activation

and in both, for layers with an adapter: c D, the input of q, k, v; c D for gate and up; c Q for o; c F for down.
Each adapter (lora/layer.py) saves h, c R; with dropout a mask, 1 byte per input; with DoRA z, c per output
(`adapter_bytes`, averaged over the layers).

In a mixture of experts a token uses K of them: F is K times the width of one (plus the shared expert's), and K
outputs, c K D, are saved for the router's weights. Norms of each head's q and k (Qwen 3) add 4 (Q + K), norms
after attention and MLP (Gemma 2 and 3) 8 D. Explicit scores (Gemma 2's soft-capped attention) are not counted: a
few times c x heads x the length of the token's sequence.

With tensor parallel, Q, K and F are those of one rank, 1 / T. With sequence parallel the norms are split by tokens
too, and so is what the norms and a recomputed layer save; A of q, k, v, gate and up, which reads their gathered
outputs, saves all of them.

Layers below the first trained one save nothing. A recomputed layer saves only its input, c D. The lowest layers
are recomputed: the backward pass reaches them after the others' activations are freed, so the one layer that it
then holds in full takes no extra memory. One layer at a time is differentiated: its gradients take at most as much
as what it saves, and one of its weights exists in the compute dtype.

If all layers are recomputed, a fused block runs its MLP in slices of S tokens (model/slices.py). Then it holds per
token, besides what attention saves, c D, the MLP's input, and gradients of c max(2 D, 2 Q + 2 K - D): first those
of the MLP's input and output, later those of attention. What the MLP saves, and its gradients, it holds for S
tokens. With --offload-activations the inputs of two recomputed layers are on the device: the one that is computed
and the one that is copied.

The plan counts live tensors. A process takes more: Python and libraries (about 0.4 GiB with torch, transformers
and accelerate on Linux), the CUDA context on a GPU, and freed memory that an allocator keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.lora.adapter import lora_layers
from qlora.lora.full_parameters import replaced_parameters
from qlora.lora.targets import head_name
from qlora.model.attention import head_counts
from qlora.model.block import decoder_layers, is_fused
from qlora.model.families import family_of, known_layers
from qlora.model.loss import CHUNK_SIZE, head_layer
from qlora.model.slices import SLICE_TOKENS
from qlora.parallel.divisibility import split_axis
from qlora.quant.layers import logical_sizes
from qlora.quant.parts import local
from qlora.system.memory import GIB

FREE_SHARE = 0.5  # of free memory that a run may use in addition to its base, without a given budget


@dataclass
class MemoryPlan:
    """Bytes on one device by component.

    Attributes:
        gradients: of trained parameters.
        activations: saved for the backward pass.
        logits: one chunk with its gradient, and the output head in the compute dtype.
        workspace: of the layer being differentiated.
        communication: buffers for other ranks (planning/devices.py); 0 on one device.
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
    """Bytes that one decoder layer saves per token, by the module's formula.

    Args:
        adapted: last name parts of the modules with an adapter.
        fused: whether the layer is a fused block (model/block.py).
        tensor_parallel, sequence_parallel: T, and whether the norms' tokens are split too.
    """
    family = family_of(config)
    (heads, kv_heads, head_dim), hidden, c = head_counts(config), config.hidden_size, dtype.itemsize
    queries, keys = heads * head_dim, kv_heads * head_dim
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    inputs = hidden * (not known_layers("qkv").isdisjoint(adapted))
    inputs += hidden * (not known_layers("mlp_in").isdisjoint(adapted))
    inputs += mlp // tensor_parallel * (not known_layers("mlp_out").isdisjoint(adapted))
    experts = getattr(config, "num_experts_per_tok", None) or 0  # per token
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


def sliced_layer_bytes(
    config: Any, dtype: torch.dtype, adapted: Collection[str], layer: int, tensor_parallel: int = 1
) -> tuple[int, int, int]:
    """Bytes of a recomputed fused block whose MLP runs in slices, by the module's formula.

    Args:
        layer: its `layer_bytes`.
    Returns:
        (saved per token, gradients per token, saved by the MLP per token of a slice).
    """
    (heads, kv_heads, head_dim), hidden, c = head_counts(config), config.hidden_size, dtype.itemsize
    queries, keys = heads * head_dim // tensor_parallel, kv_heads * head_dim // tensor_parallel
    has_input = not known_layers("mlp_in").isdisjoint(adapted)
    has_activation = not known_layers("mlp_out").isdisjoint(adapted)
    mlp = c * (config.intermediate_size // tensor_parallel) * (2 + has_activation)
    saved = layer - mlp + (0 if has_input else c * hidden)
    return saved, c * max(2 * hidden, 2 * queries + 2 * keys - hidden), mlp


def adapter_bytes(model: nn.Module, dtype: torch.dtype, tensor_parallel: int = 1) -> int:
    """Bytes that adapted layers save per token in addition to their inputs: h, dropout mask and DoRA's z.

    The output head saves nothing: its chunks are computed again.
    """
    kept, head = 0, head_name(model)
    for name, layer in lora_layers(model).items():
        if name == head:
            continue
        ranks = tensor_parallel if split_axis(name) == 1 else 1
        weights = layer.weights
        kept += weights.rank * dtype.itemsize + layer.in_features // ranks * (weights.dropout > 0)
        kept += 0 if weights.variant is None else weights.variant.token_bytes(layer, dtype.itemsize)
    return kept


def activation_bytes(layer: int, layer_input: int, num_tokens: int, num_layers: int, recomputed: int = 0) -> int:
    """Bytes that `num_tokens` tokens of one micro-batch save for the backward pass.

    Args:
        layer, layer_input: bytes per token in a kept layer (`layer_bytes`), and in a recomputed one.
        num_layers: layers that save anything; the lowest `recomputed` save only their input.
    """
    return num_tokens * (recomputed * layer_input + max(num_layers - recomputed, 1) * layer)


def differentiated_layers(model: nn.Module) -> list[Any]:
    """The decoder layers from the first trained one on; those below save no activations."""
    layers = decoder_layers(model)
    number_of = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters()}
    first = next((p for p in model.parameters() if p.requires_grad), None)  # in the order of computation
    return layers[number_of.get(id(first), 0) :]


def choose_recomputed(mode: str, totals: Sequence[int], limit: int) -> int:
    """How many of the lowest layers to recompute.

    Args:
        mode: "on": all; "off": none; "auto": the fewest that fit, or all if nothing fits.
        totals: planned bytes with 0, 1, ... all layers recomputed.
        limit: bytes that the run may use.
    """
    every = len(totals) - 1
    if mode != "auto":
        return every if mode == "on" else 0
    return next((number for number, total in enumerate(totals) if total <= limit), every)


def moment_bytes(parameter: Tensor, optim: str) -> int:
    """Bytes of AdamW's two moments: in fp32, or (8 bits) 1 byte each and an fp32 scale per 256.

    bitsandbytes keeps moments of fewer than 4,096 values in 32 bits.
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
    offloads: bool = False,
) -> list[MemoryPlan]:
    """The plans of a run with this model, adapters included, with 0, 1, ... all layers recomputed.

    The model may be loaded (`load_base_model`) or on the meta device (`plan_base_model`): only shapes and dtypes
    matter. The optimizer includes fp32 masters of bf16 adapters and two moments; gradients include the head's of
    one micro-batch in addition to the sum, if the head trains. The base includes parameters replaced by copies.

    Args:
        num_tokens: of a micro-batch.
        chunk_size: positions whose logits exist at a time.
        optim: kind of optimizer; a paged one's moments count, wherever the driver may put them.
        tensor_parallel, sequence_parallel: as for `layer_bytes`. The model must be whole, and the base is counted
            whole (planning/devices.py divides the plan).
        offloads: whether the inputs of recomputed layers are kept elsewhere.
    """
    adapted = {name.rpartition(".")[2] for name in lora_layers(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    replaced = {id(p): p for p in replaced_parameters(model).values()}
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(replaced.values())
    head = head_layer(model)
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
    logit_bytes = (4 if head_name(model) not in lora_layers(model) else 16) + dtype.itemsize
    head_copy = 0 if head is None or head.weight.dtype == dtype else head.weight.numel() * dtype.itemsize
    largest = max((size for block in layers for _, size in logical_sizes(block)), default=0)
    plan = MemoryPlan(
        base=sum(local(p).numel() * p.itemsize for p in frozen) + statistics,
        adapters=sum(p.numel() * p.itemsize for p in trainable),
        gradients=4 * (count + head_size),
        optimizer=masters + sum(moment_bytes(p, optim) for p in trainable),
        activations=0,
        logits=min(chunk_size, num_tokens) * config.vocab_size * logit_bytes + head_copy,
        workspace=num_tokens * layer + largest // tensor_parallel * dtype.itemsize,
    )
    plans = []
    for recomputed in range(len(layers) + 1):
        kept = activation_bytes(layer, layer_input, num_tokens, len(layers), recomputed)
        if recomputed == len(layers) and fused and num_tokens > SLICE_TOKENS:
            saved, gradients, mlp = sliced_layer_bytes(config, dtype, adapted, layer, tensor_parallel)
            kept += num_tokens * (saved - layer) + SLICE_TOKENS * mlp
            work = num_tokens * gradients + SLICE_TOKENS * mlp + largest // tensor_parallel * dtype.itemsize
            plan = replace(plan, workspace=work)
        if offloads:
            kept -= num_tokens * max(0, recomputed - 2) * layer_input
        plans.append(replace(plan, activations=kept))
    return plans


def default_limit(plan: MemoryPlan, free: int) -> int:
    """Memory limit of a run without a budget: what is loaded plus FREE_SHARE of the free memory, in bytes."""
    return plan.base + plan.adapters + int(FREE_SHARE * free)
