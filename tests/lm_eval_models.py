"""lm-eval's own Hugging Face model, which our scores are compared with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


def save_rounded_llama(directory: Path, **tokenizer: Any) -> Path:
    """A tiny random LLaMA in fp32 whose weights are bf16 numbers: our 16-bit base holds the same."""
    from transformers import AutoModelForCausalLM

    save_tiny_llama(directory, tokenizer=tiny_tokenizer(**tokenizer))
    network = AutoModelForCausalLM.from_pretrained(directory)
    network.bfloat16().float().save_pretrained(directory)
    return directory


def load_lm_eval(directory: Path | str, max_length: int, batch_size: int = 1) -> Any:
    """lm_eval.models.huggingface.HFLM in fp32 on the CPU; the test is skipped without lm-eval."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return huggingface.HFLM(
        pretrained=str(directory), dtype=torch.float32, device="cpu", max_length=max_length, batch_size=batch_size
    )


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """Requests as lm-eval's tasks make them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]  # type: ignore[arg-type]
