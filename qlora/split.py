"""Load a base for the processes of a run: whole on each, sharded, or in parts that compute together; checked."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from qlora.attention import packed_arguments
from qlora.distributed import Ranks
from qlora.errors import TrainingStopped
from qlora.model import find_source, first_block_name, load_base_model, load_block, settle_compute_dtype
from qlora.quantize import QuantConfig
from qlora.shard import load_sharded_model

CHECKED_TOKENS = (5, 11)  # lengths of the sequences that one block is compared on
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of the block's change to its input


def load_for_ranks(
    model: str,
    ranks: Ranks,
    accelerator: Accelerator,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    cache: bool = True,
) -> Any:
    """`load_base_model` as `ranks` split it; called on all processes, which compute in one dtype.

    Raises:
        InputError: as `load_base_model`; a model that cannot be split so.
        TrainingStopped: the split base computes other numbers than a whole one.
    """
    quant, device = quant or QuantConfig(), accelerator.device
    if not ranks.is_split:
        with accelerator.main_process_first():  # the others find the quantized base in the cache
            return load_base_model(model, use_4bit, quant, compute_dtype, device, cache)
    dtype = agreed_dtype(compute_dtype, device)
    network = load_sharded_model(model, ranks, use_4bit, quant, dtype, device, cache)
    source = find_source(model, quant if use_4bit else None, cache)
    reference = load_block(model, source, network.quantization, network.compute_dtype, device)
    check_block(network, reference, device)
    return network


def agreed_dtype(compute_dtype: str, device: torch.device) -> str:
    """The compute dtype on all processes: what "auto" measures on the first."""
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        found[0] = str(settle_compute_dtype(compute_dtype, device, cache=True)).removeprefix("torch.")
    torch.distributed.broadcast_object_list(found, device=device)
    return str(found[0])


@torch.no_grad()
def check_block(network: Any, reference: Any, device: torch.device) -> float:
    """Compare what the split network's first block computes with a whole block; called on all processes.

    Args:
        network: without adapters.
        reference: the same block, whole, as `load_block` gives it.
    Returns:
        the relative error of the block's change to its input.
    Raises:
        TrainingStopped: it is above rounding.
    """
    seen: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output)

    hook = network.get_submodule(first_block_name(network)).register_forward_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, network.config.vocab_size, (1, sum(CHECKED_TOKENS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in CHECKED_TOKENS])[None]
    bounds = torch.tensor([0, *torch.tensor(CHECKED_TOKENS).cumsum(0)], dtype=torch.int32)
    arguments = packed_arguments(bounds.to(device), max(CHECKED_TOKENS))
    try:
        network.base_model(
            input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False, **arguments
        )
    finally:
        hook.remove()
    hidden = cast(Tensor, seen["args"][0] if seen["args"] else seen["kwargs"]["hidden_states"])
    expected, found = reference(*seen["args"], **seen["kwargs"]), seen["output"]
    error = ((found - expected).float().norm() / (expected - hidden).float().norm()).item()
    if not error <= TOLERANCE[network.compute_dtype]:
        raise TrainingStopped(
            f"the split base computes other numbers than the whole one (relative error {error:.1e} in its first "
            "block), so nothing was trained; train without --shard and --tensor-parallel, and report this"
        )
    return error
