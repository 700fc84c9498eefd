"""What tensor parallel splits and over how many, against what can be cut of real 4-bit weights."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.parallel.divisibility import check_widths, possible_counts, split_axis
from qlora.quant.parts import Part, cut_weight
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system.errors import InputError
from tests.models import tiny_llama_config

DIVISIBLE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4)


def smollm2_config() -> Any:
    return tiny_llama_config(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )


@pytest.mark.parametrize(
    ("settings", "count", "said"),
    [
        (
            {},
            4,
            "2 key-value heads; a heads' width of 64, no 4 x .*; an MLP width of 160, .*It divides into none",
        ),
        (DIVISIBLE, 3, "8 heads; 4 key-value heads; .*Its layers divide into 2 or 4"),
        (
            DIVISIBLE | {"intermediate_size": 384},
            4,
            "has an MLP width of 384, no 4 x a multiple of 64. .* into 2;",
        ),
        (smollm2_config().to_dict(), 2, "9 heads; 3 key-value heads; .* into 3; or"),
    ],
)
def test_widths_that_do_not_divide(settings: dict[str, Any], count: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_widths(tiny_llama_config(**settings), count)


def test_what_divides_and_what_is_not_split() -> None:
    check_widths(smollm2_config(), 3)
    check_widths(tiny_llama_config(**DIVISIBLE), 4)
    config = SimpleNamespace(model_type="gemma2", **DIVISIBLE)
    check_widths(config, 1)
    with pytest.raises(InputError, match=r"model m is of the kind gemma2; .*llama, mistral, qwen2, qwen3"):
        check_widths(config, 2, model="m")
    assert possible_counts(config) == [] and possible_counts(tiny_llama_config()) == []
    config = tiny_llama_config(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    config.num_key_value_heads = 32  # LLaMA 7B: 11008 is 4 x 43 x 64
    assert possible_counts(config) == [2, 4]
    config.num_key_value_heads = 2
    assert possible_counts(config) == [2]


def is_cut(config: Any, count: int) -> bool:
    """Whether heads are whole in each part and every 4-bit weight of a layer can be cut."""
    heads, keys, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    queries, mlp = heads * config.head_dim, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys * config.head_dim, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    for name, shape in shapes.items():
        axis = split_axis(f"model.layers.0.{name}")
        assert axis is not None
        try:
            cut_weight(quantize_weight(torch.zeros(shape), QuantConfig()), Part(axis, 0, count))
        except ValueError:
            return False
    return heads % count == 0 and keys % count == 0


def test_what_divides_can_be_cut() -> None:
    found = set()
    for heads, keys, head_dim, hidden, mlp in itertools.product(
        (4, 6), (2, 3, 6), (32, 64), (192, 96), (256, 384)
    ):
        config = tiny_llama_config(
            num_attention_heads=heads, num_key_value_heads=keys, head_dim=head_dim, hidden_size=hidden,
            intermediate_size=mlp,
        )  # fmt: skip
        expected = [count for count in range(2, heads + 1) if is_cut(config, count)]
        assert possible_counts(config) == expected, config
        found.add(tuple(expected))
    assert {(), (2,), (3,), (2, 3, 6)} <= found


def test_axes() -> None:
    columns = "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj".split()
    assert {split_axis(f"model.layers.3.{name}") for name in columns} == {0}
    assert {split_axis(f"model.layers.3.{name}") for name in ("self_attn.o_proj", "mlp.down_proj")} == {1}
    others = "lm_head model.embed_tokens model.norm model.layers.3.input_layernorm q_proj".split()
    assert {split_axis(name) for name in others} == {None}
