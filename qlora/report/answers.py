"""Sampled answers of a run and how they changed from step to step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

T = TypeVar("T")
MOST_ROWS, MOST_PROMPTS, MOST_ANSWERS, MOST_CHARACTERS = 100, 12, 8, 1500  # of what is shown; the rest is counted
OPEN_PROMPTS = 4  # the others' answers are folded away
WIDE = (860, 260)  # view box of the loss on a large screen
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # none belongs in HTML


@dataclass
class Answer:
    """What the model said at one or more evaluations in a row.

    Attributes:
        parts: (text, whether it differs from the answer before).
        is_expected: None where nothing is known of what to expect.
    """

    steps: str
    parts: list[tuple[str, bool]]
    is_expected: bool | None


@dataclass
class Prompt:
    """A fixed prompt and how the answers to it changed.

    Attributes:
        left_out: different answers that are not shown.
    """

    text: str
    expected: str | None
    answers: list[Answer]
    left_out: int


def words(name: str) -> str:
    return name.replace("_", " ")


def short_count(count: float) -> str:
    """1,234 as it is, then 123 k, 4.5 M, 6.74 B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= max(1e4, 0.9995 * unit):
            return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:,.0f}"


def choose_evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of them, the first and the last always."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def trace_samples(samples: list[dict[str, Any]]) -> tuple[list[Prompt], int]:
    """(the first prompts with what was said to them, the number of all)."""
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    for sample in samples:  # of a step done again the last one counts
        by_prompt.setdefault(sample["prompt"], {})[sample["step"]] = sample
    shown = list(by_prompt.items())[:MOST_PROMPTS]
    return [_trace(prompt, [said[step] for step in sorted(said)]) for prompt, said in shown], len(by_prompt)


def _trace(prompt: str, samples: list[dict[str, Any]]) -> Prompt:
    """The answers to one prompt, in the order of their steps; the same ones in a row as one."""
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
    return Prompt(cut(prompt), None if expected is None else cut(expected), answers, len(runs) - len(answers))


def cut(text: str) -> str:
    left = len(text) - MOST_CHARACTERS
    return text if left <= 0 else f"{text[:MOST_CHARACTERS]} … ({left:,} more characters)"


def mark_changes(before: str | None, now: str) -> list[tuple[str, bool]]:
    """`now` in parts, with whether each is new against `before`, word by word; put together they are `now`."""
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
