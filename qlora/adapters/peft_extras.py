"""What PEFT's files hold besides A, B and parameters that train in full: copies of the base, and rows of it.

X.modules_to_save.W                     the trained value of X.W; with a resized vocabulary PEFT 0.21 writes it a
                                        second time as X.W, and the base's as X.original_module.W
X.base_layer.weight                     the base's own weight of an adapted head
X.token_adapter.trainable_tokens_delta  (n, D) new values of n rows of X.weight (not differences), for the tokens
                                        in trainable_token_indices
X.token_adapter.base_layer.weight       all rows of X.weight before that
X.lora_embedding_A, X.lora_embedding_B  LoRA on an embedding, which is refused
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qlora.adapters.peft_config import own_key
from qlora.system.errors import InputError
from qlora.system.wording import show_value

TRAINED, ORIGINAL, BASE_WEIGHT = ".modules_to_save.", ".original_module.", ".base_layer.weight"
ROWS, ALL_ROWS = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"

Rows: TypeAlias = dict[str, tuple[list[int], Tensor]]
"""Parameter name -> (token ids, (n, D) the values of these rows)."""


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of an adapter's file.

    Attributes:
        plain: PEFT's name -> A, B, or a parameter that trains in full.
        base_weights: parameter name -> the base's own value.
        rows: trained rows of parameters.
    """

    plain: dict[str, Tensor] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)


def sort_stored(file: Path, stored: dict[str, Tensor], indices: Any) -> StoredTensors:
    """Sort the tensors of an adapter's file by what they are.

    Args:
        indices: trainable_token_indices of its adapter_config.json.
    Raises:
        InputError: LoRA on an embedding, two values of one parameter, or rows and indices that do not fit.
    """
    found = StoredTensors()
    for key, tensor in stored.items():
        if ".lora_embedding_" in key:
            layer = own_key(key).partition(".lora_embedding_")[0]
            raise InputError(
                f"{file} holds LoRA on the embedding {show_value(layer)}, which this version does not compute; "
                "merge it with PEFT, or train that module whole (modules_to_save)."
            )
        if ORIGINAL in key and key.replace(ORIGINAL, TRAINED) in stored:
            continue  # the base's value, which the trained one replaces
        name = key.replace(TRAINED, ".")
        if name != key and name in stored and not torch.equal(stored[name], tensor):
            raise InputError(f"{file} holds two values of {show_value(own_key(name))}; save the adapter again.")
        if key.endswith(ROWS):
            _add_rows(file, stored, key, indices, found)
        elif key.endswith(ALL_ROWS) and key.removesuffix(ALL_ROWS) + ROWS in stored:
            continue  # read with its rows
        elif key.endswith(BASE_WEIGHT) and f"{key.removesuffix(BASE_WEIGHT)}.lora_A.weight" in stored:
            found.base_weights[own_key(key)] = tensor
        else:
            found.plain[name] = tensor
    if indices and not any(key.endswith(ROWS) for key in stored):
        raise InputError(f"{file} holds no rows for its trainable_token_indices; save the adapter again.")
    return found


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
        found.rows[own_key(f"{module}.weight")] = ids, rows
    elif whole.dim() != 2 or whole.shape[1] != rows.shape[1] or max(ids, default=-1) >= len(whole):
        raise InputError(f"{file} holds rows of {show_value(own_key(module))} that do not fit it; save it again.")
    else:
        found.plain[f"{module}.weight"] = replace_rows(whole, ids, rows)


def replace_rows(weight: Tensor, ids: list[int], rows: Tensor) -> Tensor:
    """A copy of `weight` (V, D) with other values in these rows."""
    changed = weight.clone()
    changed[ids] = rows.to(changed)
    return changed
