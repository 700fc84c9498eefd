"""One row, one plan: what the package does for many at once, for tests that look at one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora.data.example import Example, shift_targets
from qlora.data.row_encoder import RowEncoder
from qlora.planning.memory import MemoryPlan, plan_recomputing


def encode_example(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    train_on: str = "completion",
    origin: str = "the conversation",
    parse_special: bool = False,
) -> Example:
    """One conversation, or one document, as a row of at most max_length tokens: the first ones are kept."""
    row = RowEncoder(tokenizer, parse_special).encode_row(messages, train_on, origin)
    return shift_targets(*row, max_length, origin)


def plan_memory(
    model: nn.Module, num_tokens: int, dtype: torch.dtype, recomputed: int = 0, *others: Any, **options: Any
) -> MemoryPlan:
    """The plan of a run whose `recomputed` lowest layers keep no activations."""
    return plan_recomputing(model, num_tokens, dtype, *others, **options)[recomputed]
