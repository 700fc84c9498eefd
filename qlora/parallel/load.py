"""Load a base for several processes: whole, sharded, or split by tensor parallelism."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from qlora.model.load import load_base_model
from qlora.parallel.check import agreed_dtype, check_split
from qlora.parallel.fsdp import load_sharded_model
from qlora.parallel.tensor_parallel import WeightCut, split_model
from qlora.quant.weight import QuantConfig
from qlora.system.memory import trim_heap
from qlora.system.ranks import Ranks


def load_for_ranks(
    model: str,
    ranks: Ranks,
    accelerator: Accelerator,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    cache: bool = True,
    check: bool = True,
) -> Any:
    """Load a base split as `ranks` says; call on all processes, which compute in one dtype.

    Args:
        check: run `check_split` on a split base.
    Raises:
        InputError: as `load_base_model`; or the model cannot be split this way.
        TrainingStopped: the split base's numbers differ from a whole one's.
    """
    quant, device = quant or QuantConfig(), accelerator.device
    if not ranks.is_split:
        with accelerator.main_process_first():  # the others find the quantized base in the cache
            network = load_base_model(model, use_4bit, quant, compute_dtype, device, cache)
        trim_heap()
        return network
    dtype = agreed_dtype(compute_dtype, device)
    if ranks.shard_mesh is not None:
        network = load_sharded_model(model, ranks, use_4bit, quant, dtype, device, cache)
    else:
        cut = WeightCut(model, ranks)
        with accelerator.main_process_first():
            network = load_base_model(model, use_4bit, quant, dtype, device, cache, cut)
        split_model(network, cut)
    if check:
        check_split(network, cache)
    trim_heap()
    return network
