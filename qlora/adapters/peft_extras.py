"""What PEFT's files hold besides A, B and parameters that train in full: copies of the base, and rows of it.

X.modules_to_save.W                     the trained value of X.W; with a resized vocabulary PEFT 0.21 writes it a
                                        second time as X.W, and the base's as X.original_module.W
X.base_layer.weight                     the base's own weight of an adapted head or embedding
X.token_adapter.trainable_tokens_delta  (n, D) new values of n rows of X.weight (not differences), for the tokens
                                        in trainable_token_indices
X.token_adapter.base_layer.weight       all rows of X.weight before that
X.lora_embedding_A, X.lora_embedding_B  (R, V) and (D, R): LoRA on an embedding, whose weight (V, D) becomes
                                        X.weight + s (B A)^T; a tied head keeps the base's weight

V vocabulary, D hidden, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qlora.adapters.peft_config import own_key
from qlora.config.lora import LoRAConfig
from qlora.system.errors import InputError
from qlora.system.wording import show_value

TRAINED, ORIGINAL, BASE_WEIGHT = ".modules_to_save.", ".original_module.", ".base_layer.weight"
EMBEDDING = ".lora_embedding_"
ROWS, ALL_ROWS = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"


@dataclass(frozen=True)
class TrainedRows:
    """(n, D) values of the rows of some tokens, which a tied head shares."""

    ids: list[int]
    values: Tensor
    is_tied = True

    def apply(self, weight: Tensor) -> Tensor:
        """A copy of `weight` (V, D) with these values in its rows."""
        changed = weight.clone()
        changed[self.ids] = self.values.to(changed)
        return changed

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def misfit(self, rows: int) -> str | None:
        """Why this cannot change a weight of so many rows."""
        last = max(self.ids, default=-1)
        return None if last < rows else f"{rows} rows, but token {last} was trained; resize the base first"

    def __str__(self) -> str:
        return f"{len(self.ids)} rows"


@dataclass(frozen=True)
class EmbeddingLoRA:
    """LoRA on an embedding: A (R, V), B (D, R) and its scaling; a tied head does not share it."""

    A: Tensor
    B: Tensor
    scaling: float
    is_tied = False

    def apply(self, weight: Tensor) -> Tensor:
        """`weight` (V, D) fp32 + s (B A)^T."""
        A, B = (factor.to(weight) for factor in (self.A, self.B))
        return torch.addmm(weight, A.T, B.T, alpha=self.scaling)

    @property
    def width(self) -> int:
        return len(self.B)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def misfit(self, rows: int) -> str | None:
        """Why this cannot change a weight of so many rows."""
        own = self.A.shape[1]
        return None if own == rows else f"{rows} rows, but the LoRA on it has {own}; resize the base first"

    def __str__(self) -> str:
        return f"LoRA of rank {len(self.A)}"


Rows: TypeAlias = dict[str, TrainedRows | EmbeddingLoRA]
"""Name of an embedding's or head's weight (V, D) -> how it changes."""


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of an adapter's file.

    Attributes:
        plain: PEFT's name -> A, B, or a parameter that trains in full.
        base_weights: parameter name -> the base's own value.
        rows: changes of embeddings that are not whole parameters.
    """

    plain: dict[str, Tensor] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)


def sort_stored(file: Path, stored: dict[str, Tensor], config: LoRAConfig, indices: Any) -> StoredTensors:
    """Sort the tensors of an adapter's file by what they are.

    Args:
        config: the adapter's settings.
        indices: trainable_token_indices of its adapter_config.json.
    Raises:
        InputError: two values of one parameter; rows and indices, or A and B of an embedding, that do not fit.
    """
    found = StoredTensors()
    for key, tensor in stored.items():
        module, is_embedding, part = key.partition(EMBEDDING)
        if is_embedding:
            if part == "A" or f"{module}{EMBEDDING}A" not in stored:
                _add_embedding(file, stored, module, config, found)
            continue
        if ORIGINAL in key and key.replace(ORIGINAL, TRAINED) in stored:
            continue  # the base's value, which the trained one replaces
        name = key.replace(TRAINED, ".")
        if name != key and name in stored and not torch.equal(stored[name], tensor):
            raise InputError(f"{file} holds two values of {show_value(own_key(name))}; save the adapter again.")
        if key.endswith(ROWS):
            _add_rows(file, stored, key, indices, found)
        elif key.endswith(ALL_ROWS) and key.removesuffix(ALL_ROWS) + ROWS in stored:
            continue  # read with its rows
        elif key.endswith(BASE_WEIGHT) and any(
            f"{key.removesuffix(BASE_WEIGHT)}{kind}" in stored for kind in (".lora_A.weight", f"{EMBEDDING}A")
        ):
            found.base_weights[own_key(key)] = tensor
        else:
            found.plain[name] = tensor
    if indices and not any(key.endswith(ROWS) for key in stored):
        raise InputError(f"{file} holds no rows for its trainable_token_indices; save the adapter again.")
    return found


def _add_embedding(
    file: Path, stored: dict[str, Tensor], module: str, config: LoRAConfig, found: StoredTensors
) -> None:
    """Add LoRA on the embedding `module`."""
    name = own_key(f"{module}.weight")
    layer = name.removesuffix(".weight")
    if f"{module}.lora_magnitude_vector" in stored:
        raise InputError(
            f"{file} holds {config.variant_name} on the embedding {show_value(layer)}, which this version does "
            "not compute; merge it with PEFT."
        )
    A, B = (stored.get(f"{module}{EMBEDDING}{part}") for part in "AB")
    rank = config.rank_of(layer)
    if A is None or B is None or A.dim() != 2 or B.dim() != 2 or len(A) != rank or B.shape[1] != rank:
        shapes = ", ".join("none" if factor is None else str(tuple(factor.shape)) for factor in (A, B))
        raise InputError(
            f"{file} holds LoRA of rank {rank} on the embedding {show_value(layer)} with A and B of shape "
            f"{shapes}; save the adapter again."
        )
    found.rows[name] = EmbeddingLoRA(A, B, config.scaling_of(layer, rank))


def _add_rows(file: Path, stored: dict[str, Tensor], key: str, indices: Any, found: StoredTensors) -> None:
    """Add trained rows: to all rows of the parameter if the file has them, else as they are."""
    module, rows = key.removesuffix(ROWS), stored[key]
    ids = indices
    if isinstance(indices, dict):  # a tied head has the embedding's
        named = [ids for name, ids in indices.items() if module.endswith(name)]
        ids = [*named, *indices.values()][0] if indices else None
    fits = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == len(ids)
    if not fits or rows.dim() != 2 or len(rows) != len(ids):
        raise InputError(
            f"{file} holds {show_value(own_key(key))} of shape {tuple(rows.shape)}, but trainable_token_indices "
            f"is {show_value(ids)}; save the adapter again."
        )
    whole = stored.get(module + ALL_ROWS)
    if whole is None:
        found.rows[own_key(f"{module}.weight")] = TrainedRows(ids, rows)
    elif whole.dim() != 2 or whole.shape[1] != rows.shape[1] or max(ids, default=-1) >= len(whole):
        raise InputError(f"{file} holds rows of {show_value(own_key(module))} that do not fit it; save it again.")
    else:
        found.plain[f"{module}.weight"] = TrainedRows(ids, rows).apply(whole)
