"""Rows and adapters that the model cannot compute are refused before any of its weights is read or downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora.config.lora import LoRAConfig
from qlora.data.batches import lengths_of
from qlora.data.example import Example
from qlora.data.tokenizer_files import token_ids_of
from qlora.lora.adapter import create_adapter
from qlora.model.bounds import position_limit
from qlora.model.hf_config import load_config
from qlora.model.skeleton import empty_model
from qlora.system.errors import InputError


def check_lora(model: str, lora: LoRAConfig, tokenizer: Any) -> None:
    """Check a new adapter's settings against the base's modules.

    Raises:
        InputError: target_modules, layers, patterns or modules_to_save name nothing in it.
    """
    create_adapter(empty_model(model), lora, tokenizer=tokenizer)


def check_rows(model: str, tokenizer: Any, new_tokens: Sequence[str], examples: Sequence[Example]) -> None:
    """Check training or held-out rows against the sizes in the base's config.

    Args:
        tokenizer: with `new_tokens` added, which get rows of their own, as has every id before them.
    Raises:
        InputError: names the first row with a token beyond the embedding, or beyond the positions of a model
            that has a table of them.
    """
    config = load_config(model).get_text_config()
    num_rows = max([config.vocab_size, *(index + 1 for index in token_ids_of(tokenizer, new_tokens))])
    if max(tokenizer.get_vocab().values(), default=0) >= num_rows:  # otherwise no row needs to be read
        for example in examples:
            most = max(int(example.input_ids.max()), int(example.targets.max()))
            if most >= num_rows:
                token = tokenizer.convert_ids_to_tokens(most)
                raise InputError(
                    f"{example.origin} holds the token {token!r:.60} (id {most}), but the embedding of --model "
                    f"{model} has {num_rows} rows; use the tokenizer that the model was made with, or a model "
                    "whose embedding has been extended."
                )
    longest = max(lengths_of(examples), default=0)
    if longest > (getattr(config, "max_position_embeddings", None) or longest):
        limit = position_limit(empty_model(model))
        if limit is not None:
            origin = next(example.origin for example in examples if len(example) > limit)
            raise InputError(
                f"{origin} is longer than the {limit} positions of --model {model}; pass --max-length {limit}."
            )
