"""Exact match: generate the answer to each held-out example and compare it with the expected one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eval.models import EvalConfig, load_evaluated, require, require_at_least, share_out
from eval.results import check_output, print_scores, write_result
from eval.scores import proportion
from qlora.config import parse_args
from qlora.errors import InputError
from qlora.records import Record, read_records, to_messages


@dataclass
class ExactMatchConfig(EvalConfig):
    """Greedy answers to held-out prompts, compared with the expected ones."""

    match: Literal["text", "json"] = "text"
    """Compare as text or as JSON values."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "max_new_tokens", 1)


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
    from qlora.generate import generate

    answers = generate(model, tokenizer, conversations, max_new_tokens, batch_size=batch_size)
    return [
        Prediction(asked[-1]["content"], wanted, given, MATCHES[match](wanted, given))
        for asked, wanted, given in zip(conversations, expected, answers, strict=True)
    ]


def main(argv: Sequence[str]) -> None:
    config = parse_args(ExactMatchConfig, "python -m eval exact_match", argv)
    require(config, "model", "data")
    check_output(config.output)
    records = read_records(config.data or "")[: config.max_examples or None]
    model, tokenizer, accelerator = load_evaluated(config)

    def compute(mine: list[Record]) -> list[Prediction]:
        options = (config.match, config.max_new_tokens, config.batch_size)
        return exact_match(model, tokenizer, mine, *options) if mine else []

    found = share_out(accelerator, records, compute)
    if not accelerator.is_main_process:
        return
    score = proportion("exact match", [p.correct for p in found], config.confidence)
    rows = [{"id": record.origin, **asdict(p)} for record, p in zip(records, found, strict=True)]
    correct = sum(p.correct for p in found)
    counts = {"exact_match": score.value, "correct": correct, "examples": len(found)}
    write_result(
        config.output, "exact_match", [score], asdict(config), rows, {score.name: ("correct",)},
        **counts, predictions=[asdict(p) for p in found],
    )  # fmt: skip
    print_scores(f"Exact match on {config.data}", [score])
    print(f"exact match {correct}/{len(found)} = {score.value:.1%}")
