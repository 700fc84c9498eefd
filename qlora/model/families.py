"""The model families: what the project has to know of a model beside its transformers config, one row a family.

A model of a family that is not here loads, trains, merges and answers all the same, as transformers computes it. A
row says what may be done beyond that: fuse its blocks, split them between processes, write it as GGUF, read
torchtune's adapters of it, keep its experts apart, and plan its memory exactly. Whoever needs one of these asks
`family_of`, or the table; no other file lists families.

To add one, compare its modeling file in transformers with LLaMA's, write the row, and give the family a line in
tests/parity/test_families.py. tests/model/test_families_table.py compares every row with transformers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Which outputs of a head the rotary embedding turns together, as the rows of q and k are stored: (i, i + d/2), as
# Hugging Face has it, or the neighbors (2i, 2i + 1). model/rotary.py brings one into the other.
RotaryOrder = Literal["halves", "interleaved"]


@dataclass(frozen=True)
class GGUFForm:
    """How llama.cpp stores and computes a family.

    Attributes:
        architecture: its name there; several families may share one.
        rotary: order of the rows of q and k in the file.
        has_biases: whether q, k, v and o may have biases.
        has_rope_freqs: whether LLaMA 3's scaled rotary embedding can be stored, as a tensor of divisors.
    """

    architecture: str
    rotary: RotaryOrder = "halves"
    has_biases: bool = True
    has_rope_freqs: bool = False


@dataclass(frozen=True)
class Family:
    """One family. The defaults are those of a family without a row.

    Attributes:
        model_type: its name in config.json.
        block: class of the decoder block in transformers if it computes as model/block.py does: it may be fused.
        tensor_parallel: whether processes may compute a block together (parallel/tensor_parallel.py); such a block
            is a fused one.
        head_norms: q and k have norms of their own.
        post_norms: attention and MLP have norms behind them, too.
        keeps_gelu: the MLP's GELU is written out in torch and keeps one more tensor.
        qkv_bias: q, k and v have biases, which no setting turns off.
        qkv, mlp_in, mlp_out, embedding: last names of the layers.
        gguf: its form in llama.cpp; None: it is not exported.
        torchtune_rotary: order of the rows of q and k in torchtune; None: its adapters are not imported.
        gated_experts: a mixture whose experts compute the formula of model/experts.py.
        file_names: (part of a module's name, the same in its files), where these differ. The first pair marks the
            names that all of them apply to.
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
# Mixtral's files keep the names of its first release; its modules have those of other mixtures of experts.
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
    """The last names that layers of a kind have in any family."""
    return {name for family in FAMILIES.values() for name in getattr(family, kind)}


def gguf_forms() -> dict[str, GGUFForm]:
    """llama.cpp's architecture -> how it stores and computes its models."""
    return {form.architecture: form for family in FAMILIES.values() if (form := family.gguf)}
