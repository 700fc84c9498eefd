"""Merge an adapter into its base and save an ordinary Hugging Face model, one tensor at a time.

    W_merged = bf16( W_hat + (alpha / rank) B A )        added in fp32

W_hat is by default the *dequantized* base, the weights the adapter was trained against; `original` takes the
weights as they were before quantization, for which the adapter was not trained. Either way the saved model
differs from base + adapter a little (bf16 rounding at least), so the drift is measured and written down.

Quantizing the result to 4 bits again is no way back: W_hat lies on the 4-bit grid, and an update below half a
step of it is rounded away.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora.adapter import CONFIG, WEIGHTS, check_adapter, load_adapter, read_adapter
from qlora.errors import InputError
from qlora.files import explain, new_directory
from qlora.lora import linear_layers
from qlora.model import (
    dequantized_weights,
    empty_model,
    load_base_model,
    load_config,
    load_tokenizer,
    metadata_directory,
    weight_shapes,
)
from qlora.quantize import QuantConfig, logical_shape
from qlora.redact import redact
from qlora.tokenize import encode_prompt, fallback_template

GB = 10**9
# Short prompts of several kinds, for measuring drift where no data is at hand.
DRIFT_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Tom has 3 apples and buys 4 more. How many apples does he have now?",
    "Explain in one sentence why the sky is blue.",
    "def fibonacci(n):",
    "Translate to German: The weather is nice today.",
)


@dataclass
class Drift:
    """How far the saved model is from base + adapter, over the tokens of a few prompts."""

    mean_kl: float  # KL(base + adapter || saved), nats per token
    max_logit_difference: float
    greedy_agreement: float  # share of positions with the same most likely next token
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.mean_kl:.2e} nats per token, largest logit difference {self.max_logit_difference:.3f}, "
            f"same greedy token at {self.greedy_agreement:.1%} of {self.num_tokens} positions"
        )


def merge_adapter(
    model: str,
    adapter: str,
    output_dir: str,
    base: Literal["dequantized", "original"] = "dequantized",
    max_shard_size: int = 5 * GB,
    check_drift: bool = True,
) -> Drift | None:
    """Write base + adapter as a plain bf16 model directory that transformers loads by itself.

    Memory while writing stays near one tensor in fp32; measuring the drift loads each model once, in turn.

    Args:
        model: the base: directory, hub id or .gguf.
        adapter: directory; how the base was quantized is read from its weights file.
        output_dir: must not exist; appears whole or not at all.
        max_shard_size: bytes of a weights file.
    Returns:
        The drift, unless `check_drift` is off.
    Raises:
        InputError: an adapter that does not fit, or an output directory that exists.
    """
    target = Path(output_dir)
    if target.exists():
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    lora, state, _ = read_adapter(adapter)
    quant = adapter_quantization(adapter)
    network = empty_model(model)
    layers = linear_layers(network)
    check_adapter(state, lora.rank, {name: logical_shape(layer) for name, layer in layers.items()}, adapter)
    flipped = {name for name, layer in layers.items() if not isinstance(layer, nn.Linear)}  # Conv1D: (in, out)
    with new_directory(target) as staging:
        dense = dequantized_weights(model, quant, original=base == "original")
        weights = _merged_weights(dense, state, lora.alpha / lora.rank, flipped)
        _write_shards(weights, weight_shapes(network), staging, max_shard_size)
        _write_metadata(model, staging)
        drift = _measure_drift(model, adapter, quant, str(staging)) if check_drift else None
        (staging / "README.md").write_text(_model_card(model, adapter, lora.rank, lora.alpha, base, quant, drift))
    return drift


def adapter_quantization(adapter: str) -> QuantConfig | None:
    """How the base was quantized when the adapter was trained; None for a 16-bit base.

    Adapters of other tools do not say; NF4 with double quantization is taken, as QLoRA's default.
    """
    from safetensors import SafetensorError, safe_open

    weights = Path(adapter) / WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            recorded = (file.metadata() or {}).get("base_quantization")
        if recorded is None:
            return QuantConfig()
        fields = json.loads(recorded)
        return None if fields is None else QuantConfig(**fields)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{weights} has no base_quantization that reads ({explain(error)}); save it again."
        ) from error


def base_model_of(adapter: str, say: Callable[[str], Any] = print) -> str:
    """The base that an adapter names, for `merge` without --model: said aloud, for the name is the file's.

    An adapter may come from anyone, so its word reads nothing that is not on this machine: a directory, a
    .gguf file, or a hub id that was downloaded before.

    Args:
        say: hears which base it is and where the name stands.
    Raises:
        InputError: no name, or one of nothing that is here.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = read_adapter(adapter)[2].get("base_model_name_or_path")
    source = Path(adapter) / CONFIG
    if not isinstance(name, str) or not name:
        raise InputError(f"The adapter {adapter} names no base; pass --model.")
    shown = redact(name) if name.isprintable() else repr(name)
    on_network = name.startswith(("//", "\\\\"))  # a share of another machine, on Windows
    is_here = name.isprintable() and not on_network and os.path.exists(os.path.expanduser(name))
    with suppress(HFValidationError):  # it need not be a hub id
        is_here = is_here or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not is_here:
        raise InputError(
            f"{source} names {shown:.200} as its base, which is not on this machine; pass --model with the base's "
            "path, or with that name to download it."
        )
    say(f"base model: {shown}, as {source} names it")
    return name


def _merged_weights(
    dense: Iterator[tuple[str, Tensor]], state: dict[str, Tensor], scaling: float, flipped: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """(name, bf16 tensor) of every parameter, the adapter added where it has something."""
    for name, weight in dense:
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            A, B = state[f"{layer}.lora_A.weight"].float(), state[f"{layer}.lora_B.weight"].float()
            left, right = (A.T, B.T) if layer in flipped else (B, A)
            weight.addmm_(left, right, alpha=scaling)
        yield name, weight.to(torch.bfloat16)


def _write_shards(
    weights: Iterator[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    directory: Path,
    max_shard_size: int,
) -> None:
    """Write bf16 tensors as they come into safetensors shards of at most `max_shard_size` bytes, and the index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + 2 * math.prod(shape) > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        several = len(shards) > 1
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        _write_safetensors(directory / file, shard, weights)
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = 2 * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_safetensors(
    file: Path, shapes: dict[str, tuple[int, ...]], weights: Iterator[tuple[str, Tensor]]
) -> None:
    """Write the next tensors of `weights`, which `shapes` announces, without holding more than one.

    The safetensors library wants all tensors of a file in memory; the format itself is a length, a JSON
    header of dtypes, shapes and offsets, and the bytes (github.com/huggingface/safetensors, README, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for expected, (name, tensor) in zip(shapes, weights, strict=False):
            assert name == expected and tuple(tensor.shape) == shapes[name]
            handle.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _write_metadata(model: str, directory: Path) -> None:
    """Config without quantization, generation config, tokenizer and chat template."""
    from transformers import GenerationConfig

    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    # Copied as it stands: transformers refuses to save some that it loads (a temperature without sampling).
    generation = metadata_directory(model) / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, directory / generation.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer = load_tokenizer(model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = fallback_template(tokenizer)  # what training used
    tokenizer.save_pretrained(directory)


@torch.inference_mode()
def _measure_drift(model: str, adapter: str, quant: QuantConfig | None, merged: str) -> Drift:
    """Run both models over DRIFT_PROMPTS in fp32, one after the other."""
    tokenizer = load_tokenizer(merged)
    network = load_base_model(model, quant is not None, quant, compute_dtype="float32")
    context = network.config.max_position_embeddings
    prompts = [encode_prompt([{"role": "user", "content": text}], tokenizer)[:context] for text in DRIFT_PROMPTS]
    load_adapter(network, adapter)
    expected = [network(torch.tensor([ids])).logits[0] for ids in prompts]
    del network
    network = load_base_model(merged, use_4bit=False, compute_dtype="float32")
    return compare_logits(expected, [network(torch.tensor([ids])).logits[0] for ids in prompts])


def compare_logits(expected: list[Tensor], actual: list[Tensor]) -> Drift:
    """Drift between two models' (T, V) logits over the same texts."""
    p, q = torch.cat(expected).double(), torch.cat(actual).double()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return Drift(
        mean_kl=max(0.0, (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()),
        max_logit_difference=(p - q).abs().max().item(),
        greedy_agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        num_tokens=len(p),
    )


def _model_card(
    model: str,
    adapter: str,
    rank: int,
    alpha: float,
    base: str,
    quant: QuantConfig | None,
    drift: Drift | None,
) -> str:
    base_text = f"{base} ({quant.quant_type}, double quantization {quant.double_quant})" if quant else "16-bit"
    name = redact(Path(model).name if Path(model).exists() else model)
    drift_text = "not measured" if drift is None else str(drift)
    return f"""---
library_name: transformers
tags: [qlora, lora, merged]
---
# {name}, fine-tuned

A LoRA adapter (rank {rank}, alpha {alpha:g}) merged into the {base_text} weights of `{name}`, saved in bf16.

Drift from base + adapter, in fp32: {drift_text}.

Load it in 16 bits. The base's weights lie on the grid of 4-bit values, and an update smaller than half a step
of that grid is rounded away when the merged weights are quantized to 4 bits again; for a light fine-tune that
can be all of it. For 4-bit use keep base and adapter apart.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
