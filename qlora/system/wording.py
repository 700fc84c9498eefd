"""Values and lists as an error message shows them."""

from __future__ import annotations

import reprlib
from typing import Any


def explain(error: BaseException) -> str:
    """What an error over someone's file says, fit for a sentence: its first line, printable and not too long."""
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return "".join(letter if letter.isprintable() else "?" for letter in text.rstrip("."))[:300]


NUM_LISTED = 50  # mismatches that one error names


def list_problems(problems: list[str]) -> str:
    """Mismatches as one clause, the first NUM_LISTED of them by name."""
    rest = [f"and {len(problems) - NUM_LISTED} more"] if len(problems) > NUM_LISTED else []
    return "; ".join([*problems[:NUM_LISTED], *rest])


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 40
_short.maxlevel = _short.maxdict = _short.maxlist = _short.maxtuple = 3


def quote(value: Any) -> str:
    """A value for an error: its repr, so that control characters show and stay on one line, shortened."""
    return "null" if value is None else shorten(_short.repr(value), 60)


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(value: Any) -> str:
    return "null" if value is None else f"{quote(value)} ({type(value).__name__})"
