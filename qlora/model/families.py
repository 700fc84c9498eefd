"""The model families: what the project must know about a model besides its transformers config, one row each.

A model without a row still loads, trains, merges and answers, with transformers' own modules. A row adds more:
fuse its blocks, split them between processes, write it as GGUF, read torchtune's adapters of it, separate its
experts, and plan its memory exactly. Code that needs these asks `family_of` or the table; no other file lists
families.

To add one, compare its modeling file in transformers with LLaMA's, write the row, and give the family a line in
tests/parity/test_families.py. tests/model/test_families_table.py compares each row with transformers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Which outputs of a head the rotary embedding rotates together, by the stored order of q's and k's rows:
# (i, i + d/2) as in Hugging Face, or the neighbors (2i, 2i + 1). model/rotary.py converts between them.
RotaryOrder = Literal["halves", "interleaved"]


@dataclass(frozen=True)
class GGUFForm:
    """How llama.cpp stores and computes a family.

    Attributes:
        architecture: its name in llama.cpp; several families may share one.
        rotary: order of the rows of q and k in the file.
        has_biases: whether q, k, v and o may have biases.
        has_rope_freqs: whether LLaMA 3's scaled rotary embedding can be stored (as a tensor of divisors).
    """

    architecture: str
    rotary: RotaryOrder = "halves"
    has_biases: bool = True
    has_rope_freqs: bool = False


@dataclass(frozen=True)
class Family:
    """One family. The defaults are for a family without a row.

    Attributes:
        model_type: its name in config.json.
        block: transformers' class of the decoder block if model/block.py computes the same: it may be fused.
        tensor_parallel: whether processes may split a block (parallel/tensor_parallel.py); it must be fused.
        head_norms: q and k have their own norms.
        post_norms: attention and MLP are also followed by norms.
        keeps_gelu: the MLP's GELU is several torch operations and keeps one more tensor.
        qkv_bias: q, k and v always have biases.
        qkv, mlp_in, mlp_out, embedding: last names of the layers.
        gguf: its form in llama.cpp; None: it cannot be exported.
        torchtune_rotary: order of the rows of q and k in torchtune; None: its adapters cannot be imported.
        gated_experts: its experts compute the formula in model/experts.py.
        file_names: pairs (part of a module's name, that part in its files) that differ. All pairs apply to the
            names that contain the first.
    """

    model_type: str
    block: str | None = None
    tensor_parallel: bool = False
    head_norms: bool = False
    post_norms: bool = False
    keeps_gelu: bool = False
    qkv_bias: bool = False
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: tuple[str, ...] = ("down_proj",)
    embedding: tuple[str, ...] = ("embed_tokens",)
    gguf: GGUFForm | None = None
    torchtune_rotary: RotaryOrder | None = None
    gated_experts: bool = False
    file_names: tuple[tuple[str, str], ...] = ()


LLAMA_CPP = GGUFForm("llama", "interleaved", has_rope_freqs=True)
# Mixtral's files keep the names of its first release; its modules are named like other mixtures of experts.
MIXTRAL_FILES = (
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".up_proj.", ".w3."),
    (".down_proj.", ".w2."),
)
ROWS = (
    Family("llama", "LlamaDecoderLayer", True, gguf=LLAMA_CPP, torchtune_rotary="interleaved"),
    Family("mistral", "MistralDecoderLayer", True, gguf=LLAMA_CPP, torchtune_rotary="interleaved"),
    Family("gemma", torchtune_rotary="interleaved"),
    Family("gemma2", post_norms=True, torchtune_rotary="interleaved"),
    Family("gemma3_text", head_norms=True, post_norms=True),
    Family(
        "qwen2",
        "Qwen2DecoderLayer",
        True,
        qkv_bias=True,
        gguf=GGUFForm("qwen2"),
        torchtune_rotary="halves",
    ),
    Family(
        "qwen3",
        "Qwen3DecoderLayer",
        True,
        head_norms=True,
        gguf=GGUFForm("qwen3", has_biases=False),
        torchtune_rotary="halves",
    ),
    Family("phi3", qkv=("qkv_proj",), mlp_in=("gate_up_proj",)),
    Family("gpt2", keeps_gelu=True, qkv=("c_attn",), mlp_in=("c_fc",), mlp_out=("c_proj",), embedding=("wte",)),
    Family("mixtral", gated_experts=True, file_names=MIXTRAL_FILES),
    Family("olmoe", head_norms=True, gated_experts=True),
    Family("qwen2_moe", gated_experts=True),
    Family("qwen3_moe", head_norms=True, gated_experts=True),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in ROWS}


def family_of(config: Any) -> Family:
    """The family of a transformers config; the defaults for one without a row."""
    return FAMILIES.get(config.model_type, Family(config.model_type))


def known_layers(kind: Literal["qkv", "mlp_in", "mlp_out", "embedding"]) -> set[str]:
    """Last names of the layers of a kind in any family."""
    return {name for family in FAMILIES.values() for name in getattr(family, kind)}


def gguf_forms() -> dict[str, GGUFForm]:
    """llama.cpp's architecture -> how it stores and computes its models."""
    return {form.architecture: form for family in FAMILIES.values() if (form := family.gguf)}
