"""Base, data and settings that must be the same when a run is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from qlora.config.lora import LoRAConfig
from qlora.config.run import RunConfig
from qlora.data.example import Example
from qlora.data.token_cache import digests_of
from qlora.lora.full_parameters import base_name, replaced_parameters
from qlora.model.base import base_info, find_base_info
from qlora.model.fingerprint import sample_weight


def base_fingerprint(model: nn.Module) -> str:
    """Identity of the frozen weights: name, shape, dtype and 64 values of each, whatever their source.

    For a split base, the whole weights were sampled while it was loaded.
    """
    info = find_base_info(model)
    samples = None if info is None else info.weight_samples
    if samples is None:
        replaced = replaced_parameters(model)  # the base's own, replaced by an adapter's copies that train
        named = {base_name(n): replaced.get(base_name(n), p) for n, p in model.named_parameters()}
        samples = {name: sample_weight(name, p) for name, p in named.items() if not p.requires_grad}
    digest = hashlib.sha256(repr(None if info is None else info.quantization).encode())
    for _, sample in sorted(samples.items()):
        digest.update(sample)
    return digest.hexdigest()[:16]


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Identity of the tokenized training data, including its order; the same in memory or mapped."""
    return hashlib.sha256(digests_of(examples).tobytes()).hexdigest()[:16]


def run_settings(
    model: Any,
    lora: LoRAConfig,
    config: RunConfig,
    examples: Sequence[Example],
    window: int,
    total_steps: int,
    optim: str,
    chat_template: str | None,
) -> dict[str, Any]:
    """Settings that must be the same when a run is resumed, except total_steps.

    Args:
        model: with adapters in place, its base as loaded.
        window: examples of an optimizer step.
        chat_template: content of `config.data.chat_template`.
    """
    data, own = config.data, dict[str, Any]()
    if set(data.data_weights) - {1.0}:
        own["data_weights"] = data.data_weights
    if data.chat_template is not None:
        own["chat_template"] = hashlib.sha256(str(chat_template).encode()).hexdigest()[:16]
    names = ("learning_rate", "schedule", "warmup_steps", "weight_decay")
    return {
        "seed": config.loop.seed,
        **{name: getattr(config.optimizer, name) for name in names},
        **lora.variant(),
        "max_grad_norm": config.optimizer.max_grad_norm,
        "base": base_fingerprint(model),
        "data": data_fingerprint(examples),
        "optim": optim,
        "compute_dtype": str(base_info(model).compute_dtype).removeprefix("torch."),
        "examples_per_step": window,
        "total_steps": total_steps,
        **own,
    }
