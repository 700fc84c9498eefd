"""Compare answers: each text is reduced to a short canonical string, and two answers match if these are equal.

    text           the text without surrounding white space
    json           the JSON value: key order, white space and 1.0 or 1 make no difference
    json_in_text   the same, also in a fenced block or inside prose
    gsm8k          the number after "####", else the last number: "#### $1,234.50." is 1234.5
    letter         the letter chosen: "B", "(b)", "B. Paris", "The answer is B"
    regex          what the group of a pattern matches

A text without an answer gives None, which matches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from qlora.system.errors import InputError

Match = Literal["text", "json", "json_in_text", "gsm8k", "letter", "regex"]
Take = Literal["first", "last"]
Reader = Callable[[str], str | None]


@dataclass
class AnswerConfig:
    """How to read and compare answers."""

    match: Match = "text"
    """What to compare: the whole text, a JSON value (json_in_text: also inside prose), the number after #### or
    else the last number (gsm8k), the letter chosen, or what --pattern matches (regex)."""
    pattern: str | None = None
    """Regular expression with one group, for --match regex."""
    pattern_on: Literal["both", "answer"] = "both"
    """Apply --pattern to the expected text too, or use that text unchanged."""
    take: Take = "first"
    """Which one to take if --pattern matches several times or a text holds several JSON values."""

    def __post_init__(self) -> None:
        make_matcher(self.match, self.pattern, self.pattern_on, self.take)  # raises InputError

    def matcher(self) -> Matcher:
        return make_matcher(self.match, self.pattern, self.pattern_on, self.take)


@dataclass(frozen=True)
class Matcher:
    """Reads the expected and the given text; they match if both contain an answer and the two are equal."""

    read_expected: Reader
    read_answer: Reader

    def same(self, expected: str, answer: str) -> bool:
        wanted = self.read_expected(expected)
        return wanted is not None and wanted == self.read_answer(answer)


def make_matcher(
    match: str = "text", pattern: str | None = None, pattern_on: str = "both", take: Take = "first"
) -> Matcher:
    """The matcher for a name from the module's table.

    Raises:
        InputError: an unknown name, or an invalid, missing or unused pattern.
    """
    if match not in get_args(Match):
        raise InputError(f"match is {match!r}; choose one of {', '.join(get_args(Match))}.")
    if (pattern is not None) != (match == "regex"):
        found = "a pattern is given" if pattern is not None else "no pattern is given"
        raise InputError(f"match is {match} and {found}; --match regex and --pattern go together.")
    if pattern is not None:
        reader: Reader = partial(_read_pattern, _compile(pattern), take)
        return Matcher(read_text if pattern_on == "answer" else reader, reader)
    readers: dict[str, Reader] = {
        "text": read_text,
        "json": read_json_value,
        "json_in_text": partial(find_json_value, take=take),
        "gsm8k": read_number,
        "letter": read_letter,
    }
    return Matcher(readers[match], readers[match])


def read_text(text: str) -> str:
    return text.strip()


# ---- JSON ---------------------------------------------------------------------------------------------------


def _plain_number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_float=_plain_number, parse_constant=_refuse_constant)
_OPENING = re.compile(r"[{\[]")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def _decode(text: str, start: int = 0) -> tuple[str, int] | None:
    """The JSON value at `start`, rewritten with sorted keys, and where it ends; None without one."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return json.dumps(value, sort_keys=True), end
    except (ValueError, RecursionError):  # ValueError also covers a number with more digits than Python reads
        return None


def read_json_value(text: str) -> str | None:
    """The text as one JSON value."""
    text = text.strip()
    found = _decode(text)
    return found[0] if found and found[1] == len(text) else None


def find_json_value(text: str, take: Take = "first") -> str | None:
    """The text as one JSON value, else the content of a fenced block, else an object or array inside the text."""
    whole = read_json_value(text)
    if whole is not None:
        return whole
    fenced = [value for block in _FENCE.findall(text) if (value := read_json_value(block)) is not None]
    found = fenced or list(_json_in(text))
    return found[0 if take == "first" else -1] if found else None


def _json_in(text: str) -> Iterator[str]:
    """Every outermost object and array in the text."""
    position = 0
    while bracket := _OPENING.search(text, position):
        found = _decode(text, bracket.start())
        position = found[1] if found else bracket.end()
        if found:
            yield found[0]


# ---- numbers ------------------------------------------------------------------------------------------------


# A minus is a sign unless it stands between two operands, as in 10-5; it may come before or after a $.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−][$€£]?|[$€£][-−])?(?P<size>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
    re.ASCII,
)


def read_number(text: str) -> str | None:
    """The first number on the line after the first "####", else the last number, in its shortest form."""
    marked = list(_NUMBER.finditer(text.partition("####")[2].strip().partition("\n")[0]))
    found = marked[:1] or list(_NUMBER.finditer(text))[-1:]
    if not found:
        return None
    whole, _, part = found[0]["size"].replace(",", "").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if found[0]["sign"] and number != "0" else number


# ---- letters ------------------------------------------------------------------------------------------------


_END = r"\s*$|[.):\]*,]"  # after a letter that is not a word
_SAID = re.compile(
    rf"(?i:\banswer(?: is|:|\*\*:|:\*\*)(?: option)?)[\s(*\[]*([A-Z](?![\w'])|[a-z](?={_END}))", re.MULTILINE
)
_LEADING = re.compile(rf"[\s(*\[]*([A-Za-z])(?:{_END})", re.MULTILINE)
_BRACKETED = re.compile(r"[(\[{]([A-Za-z])[)\]}]")


def read_letter(text: str) -> str | None:
    """The chosen letter in upper case: the last one called the answer, else one that starts the text and is not a
    word, else the last one in brackets."""
    said = _SAID.findall(text)
    if said:
        return str(said[-1]).upper()
    leading = _LEADING.match(text)
    letters = [leading[1]] if leading else _BRACKETED.findall(text)
    return str(letters[-1]).upper() if letters else None


# ---- patterns -----------------------------------------------------------------------------------------------


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"pattern is {pattern!r}, not a regular expression ({error}); fix --pattern.") from error
    if compiled.groups != 1:
        raise InputError(
            f"pattern is {pattern!r}, with {compiled.groups} groups; give --pattern exactly one group, (...), for "
            "the answer, and write other brackets as (?:...)."
        )
    return compiled


def _read_pattern(pattern: re.Pattern[str], take: Take, text: str) -> str | None:
    found = [match[1] for match in pattern.finditer(text) if match[1] is not None]
    return found[0 if take == "first" else -1].strip() if found else None
