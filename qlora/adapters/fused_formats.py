"""Tensors of LitGPT, Megatron and minimind in PEFT's names and shapes; q, k and v are one layer in the first two.

R rank, I inputs, d outputs per head, H query heads, G key-value heads.

    LitGPT     attn.qkv.lora_A (n R, I), lora_B (rows of the n parts, R): the parts of q, k, v that train, one
               after the other, each with its own A; which ones is in hyperparameters.yaml
    Megatron   linear_qkv.adapter.linear_in (R, I), linear_out ((H + 2 G) d, R): one A for all three; the rows of B
               by group of heads, H / G times q, then k and v. linear_fc1 holds gate above up, one A for both.
               "Canonical" adapters have an adapter_q, adapter_k, ... each, with rows in order.
    minimind   <layer>.lora.A.weight (R, I), <layer>.lora.B.weight (O, R), added without a factor

The rotary embedding of all three pairs q's and k's outputs as Hugging Face does.

Formats: LitGPT 0.5.13, litgpt/lora.py; Megatron-Bridge, src/megatron/bridge/peft; minimind, model/model_lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora.model.attention import head_counts
from qlora.system.errors import InputError

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
Layers = dict[str, dict[str, Tensor]]  # layer -> A, B, MAGNITUDE -> tensor
QKV, MLP_IN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
NUMBER = r"(?P<index>0|[1-9][0-9]{0,5})"

LITGPT_LAYERS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
LITGPT_KEY = re.compile(
    rf"(?:transformer\.h\.{NUMBER}\.(?P<module>attn\.qkv|attn\.attn|{'|'.join(LITGPT_LAYERS)})|lm_head)"
    r"\.lora_(?P<side>[AB])"
)
LITGPT_PARTS = ("lora_query", "lora_key", "lora_value")  # flags in hyperparameters.yaml, in the order of QKV

MEGATRON_LAYERS = {
    "self_attention.linear_qkv": "self_attn",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc1": "mlp",
    "mlp.linear_fc2": "mlp.down_proj",
}
MEGATRON_KEY = re.compile(
    rf"(?:module\.|model\.)*decoder\.layers\.{NUMBER}\.(?P<module>{'|'.join(MEGATRON_LAYERS)})"
    r"(?:\.adapter)?(?:\.adapter_(?P<part>q|k|v|gate|up))?\.(?:linear_(?P<end>in|out)|lora_(?P<side>[AB]))\.weight"
)
MINIMIND_KEY = re.compile(r"(?:module\.|_orig_mod\.)*(?P<layer>.+)\.lora\.(?P<side>[AB])\.weight")


def split_minimind(state: Mapping[str, Tensor]) -> tuple[Layers, list[str]]:
    """(layers, names that are none of minimind's)."""
    layers: Layers = {}
    unknown = []
    for key, tensor in state.items():
        match = MINIMIND_KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            layers.setdefault(match["layer"], {})[A if match["side"] == "A" else B] = tensor
    return layers, unknown


def split_litgpt(
    state: Mapping[str, Tensor], config: Any, rank: int, parts: Collection[str]
) -> tuple[Layers, list[str]]:
    """(layers, names that are none of LitGPT's).

    Args:
        config: transformers config of the base.
        parts: which of q_proj, k_proj, v_proj the file holds.
    Raises:
        InputError: qkv has other rows than these parts.
    """
    layers: Layers = {}
    unknown = []
    sizes = _qkv_sizes(config)
    for key, tensor in state.items():
        match = LITGPT_KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            unknown.append(key)
            continue
        side, module = (A if match["side"] == "A" else B), match["module"]
        if module is None:
            layers.setdefault("lm_head", {})[side] = tensor
            continue
        block = f"model.layers.{int(match['index'])}"
        if module in LITGPT_LAYERS:
            layers.setdefault(f"{block}.{LITGPT_LAYERS[module]}", {})[side] = tensor
            continue
        names = [name for name in QKV if name in parts]
        rows = [rank if side == A else sizes[name] for name in names]
        if sum(rows) != len(tensor):
            raise InputError(
                f"{key} has {len(tensor)} rows, but {', '.join(names) or 'no part'} of rank {rank} have "
                f"{sum(rows)} by hyperparameters.yaml and --model; give the settings and the base of this adapter."
            )
        for name, part in zip(names, tensor.split(rows), strict=True):
            layers.setdefault(f"{block}.self_attn.{name}", {})[side] = part.contiguous()
    return layers, unknown


def split_megatron(state: Mapping[str, Tensor], config: Any) -> tuple[Layers, list[str]]:
    """(layers, names that are none of Megatron's).

    Args:
        config: transformers config of the base.
    Raises:
        InputError: a fused B has other rows than the base.
    """
    layers: Layers = {}
    unknown = []
    for key, tensor in state.items():
        match = MEGATRON_KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            unknown.append(key)
            continue
        side = A if match["end"] == "in" or match["side"] == "A" else B
        where = f"model.layers.{int(match['index'])}.{MEGATRON_LAYERS[match['module']]}"
        names = QKV if where.endswith("self_attn") else MLP_IN if where.endswith("mlp") else ()
        part = match["part"]
        if not names:
            split = {where: tensor}
        elif part is not None:
            split = {f"{where}.{part}_proj": tensor}
        elif side == A:
            split = {f"{where}.{name}": tensor.clone() for name in names}
        else:
            pieces = _megatron_qkv(key, tensor, config) if names == QKV else tensor.chunk(2)
            split = {f"{where}.{name}": piece.contiguous() for name, piece in zip(names, pieces, strict=True)}
        for layer, piece in split.items():
            layers.setdefault(layer, {})[side] = piece
    return layers, unknown


def _qkv_sizes(config: Any) -> dict[str, int]:
    """Rows of q, k and v."""
    heads, kv_heads, head_dim = head_counts(config)
    return dict(zip(QKV, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), strict=True))


def _megatron_qkv(key: str, rows: Tensor, config: Any) -> tuple[Tensor, ...]:
    """q, k and v of rows by group of heads: H / G times q, then k and v."""
    heads, kv_heads, head_dim = head_counts(config)
    wanted = (heads + 2 * kv_heads) * head_dim
    if len(rows) != wanted:
        raise InputError(
            f"{key} has {len(rows)} rows, but q, k and v of --model have {wanted}; pass the base of this adapter, "
            "and gather the parts of tensor parallel processes first."
        )
    groups = rows.reshape(kv_heads, heads // kv_heads + 2, head_dim, -1)
    q, k, v = groups.split([heads // kv_heads, 1, 1], dim=1)
    return tuple(part.reshape(-1, rows.shape[1]) for part in (q, k, v))


def common_rank(layers: Layers) -> int:
    """The rank of the first A, for a format that does not store it; the others are compared with it."""
    first = next((parts[A] for parts in layers.values() if A in parts), torch.empty(1, 0))
    return len(first) if first.dim() == 2 else 1
