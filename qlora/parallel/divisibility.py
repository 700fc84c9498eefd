"""Which layers tensor parallelism splits, and over how many processes: for a run and for its plan.

T processes compute each decoder layer together (parallel/tensor_parallel.py): q, k, v, gate and up are split by
rows, o and down by columns, the rest is whole. Every process computes whole heads, and each row of its part of a
4-bit weight is a whole number of blocks of b = 64 weights, so that

    T divides       heads and key-value heads
    T b divides     the heads' width (heads x head_dim) and the MLP's
    b divides       the hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora.model.attention import head_counts
from qlora.model.families import FAMILIES, family_of
from qlora.quant.weight import BLOCK_SIZES
from qlora.system.errors import InputError

COLUMN_PARALLEL, ROW_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
BLOCK_SIZE = BLOCK_SIZES[0]


def split_axis(layer: str) -> int | None:
    """The axis that splits a layer's weight (out, in): 0 by rows, 1 by columns; None: it stays whole.

    Args:
        layer: its qualified name.
    """
    last = layer.rpartition(".")[2]
    if ".layers." not in layer or last not in COLUMN_PARALLEL + ROW_PARALLEL:
        return None
    return int(last in ROW_PARALLEL)


def check_widths(config: Any, count: int, model: str = "") -> None:
    """Refuse a model whose layers do not divide into `count` parts.

    Args:
        config: the model's transformers config.
        model: its name, for the message.
    Raises:
        InputError: lists every number that does not divide, and the counts that work.
    """
    if count == 1:
        return
    named = f"--tensor-parallel {count}: the model {model}".rstrip()
    if not family_of(config).tensor_parallel:
        possible_kinds = [kind for kind, family in FAMILIES.items() if family.tensor_parallel]
        raise InputError(
            f"{named} is of the kind {config.model_type}; tensor parallel is for {', '.join(possible_kinds)}. "
            "Use --shard fsdp."
        )
    problems = _indivisible(config, count)
    if problems:
        possible = possible_counts(config)
        remedy = f"Its layers divide into {_listed(possible)}" if possible else "It divides into none"
        raise InputError(f"{named} has {'; '.join(problems)}. {remedy}; or use --shard fsdp.")


def possible_counts(config: Any) -> list[int]:
    """The numbers of processes, 2 or more, that a model's layers divide into."""
    if not family_of(config).tensor_parallel:
        return []
    return [n for n in range(2, config.num_attention_heads + 1) if not _indivisible(config, n)]


def _indivisible(config: Any, count: int) -> list[str]:
    """The sizes of a model that do not divide into `count` parts, in words."""
    (heads, kv_heads, head_dim), hidden = head_counts(config), config.hidden_size
    problems = [f"{n} {what}" for n, what in ((heads, "heads"), (kv_heads, "key-value heads")) if n % count]
    if hidden % BLOCK_SIZE:
        problems.append(f"a hidden size of {hidden}, no multiple of {BLOCK_SIZE}")
    for width, what in ((heads * head_dim, "a heads' width"), (config.intermediate_size, "an MLP width")):
        if width % (count * BLOCK_SIZE):
            problems.append(f"{what} of {width}, no {count} x a multiple of {BLOCK_SIZE}")
    return problems


def _listed(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
