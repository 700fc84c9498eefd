"""Exact match: generate the answer to each held-out example and compare it with the expected one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import InputError
from qlora.generate import generate
from qlora.records import Record, to_messages


@dataclass
class Prediction:
    """One example: what was asked, wanted and given."""

    prompt: str
    expected: str
    answer: str
    correct: bool


def same_text(expected: str, answer: str) -> bool:
    """Equal but for white space at the ends."""
    return expected.strip() == answer.strip()


def same_json(expected: str, answer: str) -> bool:
    """Equal as JSON values: order of keys and white space do not count."""
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except json.JSONDecodeError:
        return False


MATCHES: dict[str, Callable[[str, str], bool]] = {"text": same_text, "json": same_json}


def exact_match(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    match: str = "text",
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> list[Prediction]:
    """Greedy answers to the last assistant turn of each record.

    Args:
        match: "text" or "json".
    Raises:
        InputError: no records, or one without an assistant turn to compare with.
    """
    if not records:
        raise InputError("There is nothing to evaluate: the data holds no record.")
    conversations, expected = [], []
    for record in records:
        messages = to_messages(record)
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{record.origin} does not end with an assistant turn; exact match needs an answer.")
        conversations.append(messages[:-1])
        expected.append(messages[-1]["content"])
    answers = generate(model, tokenizer, conversations, max_new_tokens, batch_size=batch_size)
    return [
        Prediction(asked[-1]["content"], wanted, given, MATCHES[match](wanted, given))
        for asked, wanted, given in zip(conversations, expected, answers, strict=True)
    ]
