"""Choose which decoder layers recompute their activations in the backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from qlora.model.base import base_info, ranks_of
from qlora.model.block import decoder_layers
from qlora.model.loss import CHUNK_SIZE
from qlora.parallel.fsdp import end_backward_at
from qlora.planning.devices import add_communication, layout_of, measure_layout
from qlora.planning.memory import (
    MemoryPlan,
    choose_recomputed,
    default_limit,
    differentiated_layers,
    plan_recomputing,
)
from qlora.system.memory import GIB, available_memory, return_large_frees
from qlora.training.offload import Store, recompute_from


def choose_recomputed_layers(
    model: Any,
    mode: str,
    num_tokens: int,
    memory_budget: int | None = None,
    accelerator: Accelerator | None = None,
    say: Callable[[str], Any] = print,
    optim: str = "adamw",
    store: Store | None = None,
) -> tuple[float, MemoryPlan]:
    """Turn on recomputation for the lowest layers; say how many, why, and the planned memory of the run.

    Recomputation is non-reentrant: the reentrant kind gets no gradient after frozen embeddings. A sharded base is
    gathered for the backward pass only down to the first layer that trains.

    Args:
        mode: "on" all layers, "off" none, "auto" as few as make the plan fit the budget.
        num_tokens: the most that a micro-batch holds.
        memory_budget: bytes for everything planned; None = the base and half of the free memory.
        accelerator: gives the device; its processes share a CPU's memory and decide the same.
        optim: kind of optimizer.
        store: keeps the inputs of recomputed layers; None = the device's memory.
    Returns:
        (the share of the model's decoder layers that are recomputed, from 0 to 1; the plan).
    """
    dtype = base_info(model).compute_dtype
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    layers = differentiated_layers(model)
    ranks = ranks_of(model, accelerator)
    divided = ranks.tensor_size, ranks.sequence_parallel
    plans = plan_recomputing(model, num_tokens, dtype, CHUNK_SIZE, optim, *divided, store is not None)
    if ranks.size > 1:
        census = measure_layout(model)
        if ranks.cpu_offload:  # the shards are in main memory
            plans = [replace(plan, base=census.replaced) for plan in plans]
        plans = add_communication(plans, census, layout_of(ranks), num_tokens)
    limit, source = memory_budget, "--memory-budget"
    if limit is None:
        free = _free_memory(device, accelerator)
        limit, source = default_limit(plans[0], free), "what is loaded and half of what is free"
    number = choose_recomputed(mode, [plan.total for plan in plans], limit)
    if ranks.shard_mesh is not None and layers:
        end_backward_at(layers[0])
    recompute = partial(checkpoint, use_reentrant=False) if store is None else partial(recompute_from, store)
    for index, layer in enumerate(layers):
        # As transformers' own switch, but without requiring a gradient of the embeddings' output: that would
        # differentiate the layers below the first adapted one for nothing.
        layer._gradient_checkpointing_func = recompute
        layer.gradient_checkpointing = index < number
    if number and device.type == "cpu":  # memory is short
        return_large_frees()
    reason = f"--gradient-checkpointing {mode}"
    if mode == "auto":
        reason = f"keeping all would take {plans[0].total / GIB:.2f} of at most {limit / GIB:.2f} GiB, {source}"
    name, planned = str(dtype).removeprefix("torch."), plans[number]
    say(f"computing in {name}; {number} of {len(layers)} layers are recomputed in the backward pass ({reason})")
    if store is not None and number:
        say(f"the inputs of the recomputed layers are kept in {store.place}")
    elif store is not None:
        say("--offload-activations has nothing to do: no layer is recomputed")
    excess = "; more than that, so it may not fit" if mode == "auto" and planned.total > limit else ""
    say(f"{planned} at {num_tokens} tokens a micro-batch{excess}")
    return number / max(1, len(decoder_layers(model))), planned


def _free_memory(device: torch.device, accelerator: Accelerator | None) -> int:
    """Free bytes per process (a share of a CPU's); the minimum over processes, so that all decide the same."""
    free = available_memory(device)
    if accelerator is None or accelerator.num_processes == 1:
        return free
    if device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return int(accelerator.gather(torch.tensor([free], device=device)).min())
