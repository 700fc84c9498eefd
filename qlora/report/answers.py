"""Sampled answers of a run, and how they changed from step to step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

T = TypeVar("T")
MOST_ROWS, MOST_PROMPTS, MOST_ANSWERS, MOST_CHARACTERS = (
    100,
    12,
    8,
    1500,
)  # limits of what is shown; the rest is only counted
OPEN_PROMPTS = 4  # answers to the other prompts are collapsed
WIDE = (860, 260)  # view box of the loss on a large screen
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # not allowed in HTML


@dataclass
class Answer:
    """An answer given at one or more consecutive evaluations.

    Attributes:
        parts: (text, whether it differs from the previous answer).
        is_expected: None if the expected answer is unknown.
    """

    steps: str
    parts: list[tuple[str, bool]]
    is_expected: bool | None


@dataclass
class PromptHistory:
    """A fixed prompt and how its answers changed.

    Attributes:
        left_out: number of different answers that are not shown.
    """

    text: str
    expected: str | None
    answers: list[Answer]
    left_out: int


def words(name: str) -> str:
    return name.replace("_", " ")


def short_count(count: float) -> str:
    """Format a number as 1,234, 123 k, 4.5 M or 6.74 B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= max(1e4, 0.9995 * unit):
            return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:,.0f}"


def choose_evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` items, evenly spaced, always with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def trace_samples(samples: list[dict[str, Any]]) -> tuple[list[PromptHistory], int]:
    """(the first prompts with their answers, the number of all prompts)."""
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    for sample in samples:  # if a step was repeated, the last sample counts
        by_prompt.setdefault(sample["prompt"], {})[sample["step"]] = sample
    shown = list(by_prompt.items())[:MOST_PROMPTS]
    return [_trace(prompt, [said[step] for step in sorted(said)]) for prompt, said in shown], len(by_prompt)


def _trace(prompt: str, samples: list[dict[str, Any]]) -> PromptHistory:
    """The answers to one prompt by step; equal consecutive answers become one."""
    expected = next((s["expected"] for s in samples if isinstance(s.get("expected"), str)), None)
    runs = [list(same) for _, same in groupby(samples, key=lambda sample: sample["completion"])]
    answers: list[Answer] = []
    before: str | None = None
    for same in choose_evenly(runs, MOST_ANSWERS):
        text, first, last = same[0]["completion"], same[0]["step"], same[-1]["step"]
        steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        is_expected = None if expected is None else text.strip() == expected.strip()
        answers.append(Answer(steps, mark_changes(before, cut(text)), is_expected))
        before = cut(text)
    return PromptHistory(
        cut(prompt), None if expected is None else cut(expected), answers, len(runs) - len(answers)
    )


def cut(text: str) -> str:
    left = len(text) - MOST_CHARACTERS
    return text if left <= 0 else f"{text[:MOST_CHARACTERS]} … ({left:,} more characters)"


def mark_changes(before: str | None, now: str) -> list[tuple[str, bool]]:
    """Split `now` into (text, whether it is new compared with `before`), word by word; joined they give `now`."""
    if before is None:
        return [(now, False)] if now else []
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, now))
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new).get_opcodes():
        text = "".join(new[start:end])
        bare = text.lstrip()
        is_new = kind != "equal"
        parts += [(text[: len(text) - len(bare)], False), (bare, True)] if is_new else [(text, False)]
    return [part for part in parts if part[0]]
