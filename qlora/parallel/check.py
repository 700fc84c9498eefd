"""Compare a split base's first decoder layer with a whole one; raise if they differ."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.model.attention import packed_arguments
from qlora.model.base import base_info
from qlora.model.block import decoder_layers, exchange_of
from qlora.model.cache import find_source
from qlora.model.load import cached_compute_dtype, load_first_block
from qlora.quant.layers import drop_scratch
from qlora.system.errors import TrainingStopped
from qlora.system.memory import trim_heap

CHECKED_TOKENS = (5, 11)  # lengths of the sequences that one block is compared on
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the block's change of its input


def agreed_dtype(compute_dtype: str, device: torch.device) -> str:
    """The compute dtype of all processes; "auto" is measured on the first."""
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        found[0] = str(cached_compute_dtype(compute_dtype, device, cache=True)).removeprefix("torch.")
    torch.distributed.broadcast_object_list(found, device=device)
    return str(found[0])


def check_split(network: Any, cache: bool = True) -> float:
    """Compare the first block of a split base without adapters with a whole one; call on all processes.

    Returns:
        as `check_block`.
    Raises:
        TrainingStopped: their outputs differ.
    """
    info, device = base_info(network), next(network.buffers()).device
    source = find_source(info.source, info.quantization, cache)
    whole = load_first_block(info.source, source, info.quantization, info.compute_dtype, device)
    sample = sample_block(whole)
    del whole
    drop_scratch()  # as large as a whole weight
    gc.collect()  # its modules have reference cycles
    trim_heap()  # before the split one gathers its own
    return check_block(network, sample)


class _Seen(Exception):
    """Raised to stop the forward pass after the first block."""


class BlockSample(NamedTuple):
    """Positional and keyword arguments of a model's first block, and its output (1, N, D)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@torch.no_grad()
def check_block(network: Any, sample: BlockSample) -> float:
    """Compare the first block of a split network with the sample of a whole one; call on all processes.

    Args:
        network: without adapters.
        sample: from the whole model.
    Returns:
        the relative error of the block's change of its input.
    Raises:
        TrainingStopped: it exceeds rounding error.
    """
    block, (args, kwargs, expected) = decoder_layers(network)[0], sample
    if hasattr(block, "unshard"):  # called alone, the block would take itself for the whole model
        block.unshard()
        found = block.forward(*args, **kwargs)
        block.reshard()
    else:
        found = block(*args, **kwargs)
    found = exchange_of(block).collect(found, expected.shape[1])
    error = ((found - expected).float().norm() / (expected - args[0]).float().norm()).item()
    if not error <= TOLERANCE[base_info(network).compute_dtype]:
        raise TrainingStopped(
            f"the split base computes other numbers than the whole one (relative error {error:.1e} in its first "
            "block), so nothing was trained; train without --shard and --tensor-parallel, and report this"
        )
    return error


@torch.no_grad()
def sample_block(whole: Any) -> BlockSample:
    """Run the first block of a model from `load_first_block` on two sequences of random numbers."""
    generator, count = torch.Generator().manual_seed(0), sum(CHECKED_TOKENS)
    block = decoder_layers(whole)[0]
    device = next(block.parameters()).device
    dtype = base_info(whole).compute_dtype
    hidden = torch.randn(1, count, whole.config.hidden_size, generator=generator).to(device, dtype)
    positions = torch.cat([torch.arange(length) for length in CHECKED_TOKENS])[None]
    bounds = torch.tensor([0, *torch.tensor(CHECKED_TOKENS).cumsum(0)], dtype=torch.int32)
    arguments = packed_arguments(bounds.to(device), max(CHECKED_TOKENS))
    seen: list[BlockSample] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(BlockSample(args, kwargs, output))
        raise _Seen

    hook = block.register_forward_hook(keep, with_kwargs=True)
    with suppress(_Seen):
        whole.base_model(inputs_embeds=hidden, position_ids=positions.to(device), use_cache=False, **arguments)
    hook.remove()
    return seen[0]
