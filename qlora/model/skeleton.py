"""A model without weights: its modules, its parameters' names and shapes, and how stored names match them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora.model.experts import separate_experts
from qlora.model.gguf_source import GGUFSource
from qlora.model.hf_config import load_config, named_failure
from qlora.model.safetensors_source import SafetensorsSource, saved_name
from qlora.quant.layers import FrozenMatrix
from qlora.system.errors import InputError
from qlora.system.wording import list_first

Source: TypeAlias = "SafetensorsSource | GGUFSource | EmptySource"
# Buffers that old checkpoints stored; today's modules compute them.
STORED_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class EmptySource:
    """A source of weights with shapes but no values."""

    def __init__(self, network: Any) -> None:
        self._shapes = _parameter_shapes(network)
        self.path, self.names = Path(), set(self._shapes)
        self.packed: dict[str, str] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def is_float(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="meta")

    view = read


def weight_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of an `empty_model` by the name transformers saves it under, tied ones once.

    In the order and the layout of `dequantized_weights`.
    """
    kind = network.config.model_type
    return {saved_name(name, kind): shape for name, shape in _parameter_shapes(network).items()}


def _parameter_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, tied ones once."""
    tied = tied_names(network)
    return {name: tuple(p.shape) for name, p in network.named_parameters() if name not in tied}


def names_to_quantize(network: Any, source: Source) -> set[str]:
    """The weights to quantize to 4 bits: linear layers, Conv1D and experts' matrices, except the output head.

    None if the checkpoint is quantized already: what it keeps in 16 bits is intentional.
    """
    if source.packed:
        return set()
    head = network.get_output_embeddings()
    names = {f"{name}.weight" for name, module in matrix_layers(network).items() if module is not head}
    if not names:
        raise InputError(f"A {network.config.model_type} model has no linear layers to quantize; pass --no-4bit.")
    return names


def matrix_layers(network: Any) -> dict[str, nn.Module]:
    """Qualified name -> layer whose weight is one matrix that may be quantized; includes the output head."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, FrozenMatrix)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def transposed_names(network: Any) -> set[str]:
    """The weights that files hold as (in, out) and 4-bit layers as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Conv1D)}


def empty_model(model: str) -> Any:
    """The model's modules with parameters on the meta device and real (computed) buffers.

    They are transformers' own, except for separate experts (qlora/model/experts.py).
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from qlora.model.attention import ATTENTION_NAME, register_attention

    register_attention()
    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    failure = named_failure(f"--model {model} cannot be loaded as a causal language model", "choose another model")
    with init_empty_weights(include_buffers=False), failure:
        network = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION_NAME, trust_remote_code=False
        )
        separate_experts(network)
    return network


def tied_names(network: Any) -> list[str]:
    """Parameters that alias another one (lm_head when embeddings are tied)."""
    if not network.config.tie_word_embeddings:
        return []
    return list(getattr(network, "_tied_weights_keys", None) or ())


def match_names(network: Any, source: Source) -> dict[str, str]:
    """Parameter name -> stored name, or one error that lists everything missing, extra or misshapen."""
    expected, transposed = _parameter_shapes(network), transposed_names(network)
    prefix = network.base_model_prefix + "."
    bare = not any(name.startswith(prefix) for name in source.names)  # GPT-2's files omit the prefix
    stored = {name: name.removeprefix(prefix) if bare else name for name in expected}
    problems = [f"missing {name}" for name, key in stored.items() if key not in source.names]
    for name, key in stored.items():
        wanted = expected[name][::-1] if name in transposed and key in source.packed else expected[name]
        if key in source.names and source.shape(key) != wanted:
            problems.append(f"{name} is {source.shape(key)} but should be {wanted}")
        elif key in source.names and not source.is_float(key):
            problems.append(f"{name} holds whole numbers or narrow floats, whose scales are not known")
    companions = [key + part for key in source.packed for part in (".absmax", ".quant_map")]
    problems += [f"missing {name}" for name in companions if name not in source.names]
    known = set(stored.values()) | set(tied_names(network))
    for name in source.names - known:
        if name.partition(".weight.")[0] + ".weight" not in source.packed and not name.endswith(STORED_BUFFERS):
            problems.append(f"unexpected {name}")
    if problems:
        listed = list_first(sorted(problems))
        raise InputError(f"The weights in {source.path} do not fit the config: {listed}.")
    return stored


def set_tensor(network: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, value)
