"""Measure how far a merged model is from base + adapter: run both on the same texts in fp32, one after the other.

The texts are built-in prompts and paragraphs (export/texts.py) or a user's file. The paragraphs (or the file) also
give the perplexity of both models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.data.encode import encode_prompt, encode_records
from qlora.data.readers import read_records
from qlora.export.texts import DRIFT_PASSAGES, DRIFT_PROMPTS
from qlora.system.errors import InputError

MAX_LENGTH = 512  # tokens per text
MAX_TOKENS = 1024  # tokens read from a file: all their logits are held in memory


@dataclass
class Drift:
    """Differences between the saved model and base + adapter, over the tokens of all texts."""

    mean_kl: float  # KL(base + adapter || saved), nats per token
    max_logit_difference: float
    greedy_agreement: float  # fraction of positions with the same most likely next token
    num_tokens: int
    adapter_perplexity: float | None = None  # of base + adapter, on the paragraphs or the file
    merged_perplexity: float | None = None

    def __str__(self) -> str:
        text = (
            f"KL {self.mean_kl:.2e} nats per token, largest logit difference {self.max_logit_difference:.3f}, "
            f"same greedy token at {self.greedy_agreement:.1%} of {self.num_tokens} positions"
        )
        if self.adapter_perplexity is None:
            return text
        return f"{text}, perplexity {self.adapter_perplexity:.3f} -> {self.merged_perplexity:.3f}"


@dataclass
class DriftTexts:
    """Token ids to compare two models on; the passages also give perplexity."""

    prompts: list[list[int]]
    passages: list[list[int]]


def load_drift_texts(tokenizer: Any, source: str | None, context: int) -> DriftTexts:
    """The built-in texts, or those of the file `source` (see `load_texts`).

    Args:
        context: context length of the model, in tokens.
    """
    if source is not None:
        return DriftTexts([], load_texts(source, tokenizer, min(MAX_LENGTH, context), MAX_TOKENS))
    prompts = [encode_prompt([{"role": "user", "content": text}], tokenizer)[:context] for text in DRIFT_PROMPTS]
    passages = [tokenizer(text)["input_ids"][:context] for text in DRIFT_PASSAGES]
    return DriftTexts(prompts, passages)


def load_texts(source: str, tokenizer: Any, max_length: int, max_tokens: int) -> list[list[int]]:
    """Token ids of the first texts of a file, at most `max_tokens` in total.

    Args:
        source: a .txt or .md file, cut every `max_length` tokens; or training data, one text per row.
    Raises:
        InputError: the file is missing or empty.
    """
    if Path(source).suffix.lower() in (".txt", ".md"):
        try:
            ids = tokenizer(Path(source).read_text(encoding="utf-8"))["input_ids"]
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read as a text ({error}); check the path.") from error
        rows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    else:
        examples, _ = encode_records(read_records(source)[:max_tokens], tokenizer, max_length)
        rows = [example.input_ids.tolist() for example in examples]
    texts: list[list[int]] = []
    for row in rows:
        row = row[: max_tokens - sum(map(len, texts))]
        if len(row) > 1:
            texts.append(row)
    if not texts:
        raise InputError(f"{source} has no text of two or more tokens; give another file.")
    return texts


@torch.inference_mode()
def measure_drift(load_reference: Callable[[], Any], load_merged: Callable[[], Any], texts: DriftTexts) -> Drift:
    """Run both models over the texts; only one is in memory at a time.

    Args:
        load_reference: loads base + adapter; `load_merged` loads the saved model.
    """
    rows = texts.prompts + texts.passages

    def run(load: Callable[[], Any]) -> list[Tensor]:
        network = load()
        return [network(torch.tensor([ids])).logits[0].float() for ids in rows]

    expected, actual = run(load_reference), run(load_merged)
    drift = compare_logits(expected, actual)
    start = len(texts.prompts)
    drift.adapter_perplexity = perplexity(expected[start:], texts.passages)
    drift.merged_perplexity = perplexity(actual[start:], texts.passages)
    return drift


def compare_logits(expected: list[Tensor], actual: list[Tensor]) -> Drift:
    """Drift between two models' (T, V) logits, one tensor per text."""
    divergence, largest, same, num_tokens = 0.0, 0.0, 0, 0
    for one, other in zip(expected, actual, strict=True):
        p, q = one.double(), other.double()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        largest = max(largest, (p - q).abs().max().item())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        num_tokens += len(p)
    return Drift(max(0.0, divergence / num_tokens), largest, same / num_tokens, num_tokens)


def perplexity(logits: list[Tensor], texts: list[list[int]]) -> float:
    """exp of the mean next-token cross-entropy in nats, without the first token of each text."""
    losses = [
        F.cross_entropy(scores[:-1].double(), torch.tensor(ids[1:]), reduction="sum")
        for scores, ids in zip(logits, texts, strict=True)
    ]
    return (torch.stack(losses).sum() / sum(len(ids) - 1 for ids in texts)).exp().item()
