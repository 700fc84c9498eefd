"""One row, one plan, one call: what the package does for many at once, for tests that look at one. A new cache."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.data import dataset
from qlora.data.example import Example, shift_targets
from qlora.data.row_encoder import RowEncoder
from qlora.planning.memory import MemoryPlan, plan_recomputing
from qlora.system.cache import cache_directory


def new_cache(directory: Path) -> str:
    """A cache with nothing but the present one's compiled kernels, which take five seconds."""
    directory.mkdir(mode=0o700)
    for file in cache_directory().glob("*-*.*"):
        if file.suffix in (".so", ".xxh3"):
            shutil.copy2(file, directory)
    return str(directory)


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


def load_examples(
    source: Any, tokenizer: Any, max_length: int, **options: Any
) -> tuple[dataset.Examples, Sequence[Example]]:
    """The package's `load_examples`; every option of sources, encoder and call is a keyword."""
    names = {"weights": "weights", "eval_source": "held_out", "eval_split": "split", "seed": "seed"}
    of_sources = {names[name]: options.pop(name) for name in names if name in options}
    own = {
        name: options.pop(name)
        for name in ("say", "on_bad_row", "bad_rows_file", "show_sample")
        if name in options
    }
    encoder = dataset.Encoder(tokenizer, max_length, **options)
    return dataset.load_examples(dataset.Sources(source, **of_sources), encoder, **own)


def plan_memory(
    model: nn.Module, num_tokens: int, dtype: torch.dtype, recomputed: int = 0, *others: Any, **options: Any
) -> MemoryPlan:
    """The plan of a run whose `recomputed` lowest layers keep no activations."""
    return plan_recomputing(model, num_tokens, dtype, *others, **options)[recomputed]
