"""Values and lists as an error message shows them."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Sequence
from typing import Any

from qlora.system.redact import redact


def explain(error: BaseException) -> str:
    """What an error over someone's file says, fit for a sentence: its first line, printable and not too long."""
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return "".join(letter if letter.isprintable() else "?" for letter in text.rstrip("."))[:300]


def tell(text: str) -> None:
    """A sentence for the user on standard error, from code that does not know where its caller's lines go."""
    print(redact(text), file=sys.stderr)


NUM_LISTED = 50  # mismatches that one error names


def list_first(items: Sequence[str], limit: int = NUM_LISTED, separator: str = "; ") -> str:
    """Some as they are, of many the first `limit` and how many more there are."""
    rest = [f"and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *rest])


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 40
_short.maxlevel = _short.maxdict = _short.maxlist = _short.maxtuple = 3


def quote(value: Any) -> str:
    """A value of the user's own data: its repr, so that control characters show, shortened, on one line."""
    return "null" if value is None else shorten(_short.repr(value), 60)


def show_value(value: Any, limit: int = 60) -> str:
    """A value out of someone's file: a name as it is, others by their repr; cut, on one line, without secrets."""
    is_plain = isinstance(value, str) and value.isprintable()
    return redact(value if is_plain else _short.repr(value))[:limit]


def shorten(text: str, limit: int) -> str:
    """The beginning of a text, "..." included at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show_controls(text: str) -> str:
    """`text` with control characters written out, such as \\x1b: a terminal would obey them."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def describe(value: Any) -> str:
    return "null" if value is None else f"{quote(value)} ({type(value).__name__})"
