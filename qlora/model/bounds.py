"""How many tokens and positions a model knows, and a check of both where it looks them up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.system.errors import InputError

SPARE_POSITIONS = 2  # rows that OPT's table of positions has before the first


def position_limit(network: Any) -> int | None:
    """How many positions a model's learned or stored table of them has; None: positions are computed.

    Args:
        network: an `empty_model`.
    """
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tokens = network.get_input_embeddings()
    tables = [m.weight for m in network.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    tables += [buffer for buffer in network.buffers() if buffer.dim() > 1]  # GPT-J's angles, GPT-Neo's masks
    sizes = {size for table in tables for size in table.shape}
    return limit if limit and sizes & set(range(limit, limit + SPARE_POSITIONS + 1)) else None


def check_lookup(module: Any, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of an embedding: torch's own error would be a traceback, on CUDA the end of the process.

    Only on a CPU, where it costs microseconds: `check_rows` (training/rows.py) refuses rows beforehand.

    Raises:
        InputError: an index that the table has no row for.
    """
    ids, size = args[0], len(module.weight)
    if type(ids) is not Tensor or ids.device.type != "cpu" or not ids.numel():
        return  # meta, fake, or on CUDA
    least, most = torch.aminmax(ids)
    if least < 0 or most >= size:
        wrong = int(least if least < 0 else most)
        raise InputError(
            f"The model was given the token id or position {wrong}, but its table has {size} rows; use its own "
            "tokenizer, and texts no longer than its positions."
        )
