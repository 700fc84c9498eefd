"""Answers: what each way to compare reads out of a text, against slow, obvious comparisons."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.answers import (
    AnswerConfig,
    find_json_value,
    make_matcher,
    read_json_value,
    read_letter,
    read_number,
)
from qlora.system.errors import InputError

fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([1.0, 0.5, -0.0, 1e300])
    | st.text("ab", max_size=2)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner, max_size=3),
)


def same_value(a: Any, b: Any) -> bool:
    """JSON's equality, spelled out: Python's own holds true for 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def turned_round(value: Any) -> Any:
    """The same value, the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: turned_round(value[key]) for key in reversed(value)}
    return [turned_round(item) for item in value] if isinstance(value, list) else value


@fuzz
@given(values, values)
def test_json_texts_are_the_same_where_their_values_are(a: Any, b: Any) -> None:
    read = read_json_value(json.dumps(a))
    assert read is not None and read == read_json_value(f"\n{json.dumps(turned_round(a), indent=3)} ")
    assert (read == read_json_value(json.dumps(b))) == same_value(a, b)


@fuzz
@given(values.filter(lambda value: isinstance(value, (dict, list))), st.booleans())
def test_json_is_found_amid_prose(value: Any, fenced: bool) -> None:
    text = json.dumps(value, indent=2 if fenced else None)
    answer = f"Sure [of {{it}}!\n```json\n{text}\n```\nOr 1." if fenced else f"Sure {{it is: {text}, I think."
    assert find_json_value(answer) == read_json_value(text) and read_json_value(answer) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None), ("Sure! {", None), ("{'a': 1}", None), ("NaN", None), ('{"a": Infinity}', None), ("1 2", None),
        ("[" * 100_000, None), ("9" * 5000, None), ("1e999999", "Infinity"), ('{"a": 1, "a": 2}', '{"a": 2}'),
    ],
)  # fmt: skip
def test_json_that_is_none(text: str, found: str | None) -> None:
    assert read_json_value(text) == found


def test_the_first_or_the_last_json_value() -> None:
    prose = 'first [1, [2]], then {"a": [3]}.'
    assert find_json_value(prose) == "[1, [2]]" and find_json_value(prose, "last") == '{"a": [3]}'
    fences = "{}\n```\n1\n```\n```json\nnone\n```\n```json\n2\n```\n[3]"
    assert find_json_value(fences) == "1" and find_json_value(fences, "last") == "2"


numbers = st.tuples(st.integers(-(10**12), 10**12), st.integers(0, 4))


def spelled(number: tuple[int, int], commas: bool, zeros: int, frame: str) -> str:
    """An integer, and how many of its digits stand behind the point, as people write it."""
    digits, point = number
    text = f"{abs(digits):0{point + 1}d}"
    whole, part = (text[:-point], text[-point:]) if point else (text, "")
    whole = f"{int(whole):,}" if commas else whole
    part += "0" * zeros
    return frame.format(f"{'-' if digits < 0 else ''}{whole}{'.' if part else ''}{part}")


frames = st.sampled_from(
    ["{}", "#### {}", "3 + 4 = 7\n#### ${}.", "It costs ${}.", "1. So 2 of 3 are {}%", "= {} USD!"]
)


@fuzz
@given(numbers, numbers, st.booleans(), st.integers(0, 2), frames)
def test_numbers_are_the_same_where_their_values_are(
    a: tuple[int, int], b: tuple[int, int], commas: bool, zeros: int, frame: str
) -> None:
    read = read_number(spelled(a, commas, zeros, frame))
    assert read is not None and Fraction(read) == Fraction(a[0], 10 ** a[1])
    assert (read == read_number(spelled(b, False, 0, "{}"))) == (
        Fraction(a[0], 10 ** a[1]) == Fraction(b[0], 10 ** b[1])
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None), ("none", None), ("####", None), ("#### five", None), ("3 cats\n#### five\n", "3"),
        ("2 + 2 = 4\n#### 4\nQuestion: 9?\n#### 10", "4"), ("####\n5", "5"), ("#### about 12 or 13", "12"),
        ("10-5", "5"), ("5 - 3", "3"), ("x = -5", "-5"), ("$-5", "-5"), ("-$5.00", "-5"), ("−7", "-7"),
        ("a (3)-4", "4"), ("1,2,3", "3"), ("1234,567", "567"), ("-0", "0"), ("-0.0", "0"),
        (" 007.", "7"), ("x=.5.", "0.5"),
        ("9" * 5000, "9" * 5000), ("٣", None),
    ],
)  # fmt: skip
def test_numbers_in_odd_places(text: str, number: str | None) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" b\n", "B"), ("(b)", "B"), ("B. Paris", "B"), ("B, because", "B"),
        ("**C**", "C"), ("D\nas said", "D"),
        ("The answer is B", "B"), ("the answer is b.", "B"),
        ("The answer is **C**.", "C"), ("**Answer:** (D) Rome", "D"),
        ("The answer is A. No: the correct answer is option C", "C"), ("A. is wrong, so the answer is B", "B"),
        ("so (C), not (D) then", "D"), (r"\boxed{B}", "B"),
        ("", None), ("A dog", None), ("I think so", None), ("the answer is a dog", None),
        ("Bob (it's)", None), ("42", None),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert read_letter(text) == letter


def test_patterns() -> None:
    text = "x = 3, then x = 4 "
    first, last = (make_matcher("regex", r"x = (\d)", take=take) for take in ("first", "last"))  # type: ignore[arg-type]
    assert first.read_answer(text) == "3" and last.read_answer(text) == "4" and first.read_answer("y = 3") is None
    assert first.same("x = 3", text) and not first.same("3", text) and not first.same("y", "y")
    bare = make_matcher("regex", r"x = (\d)", pattern_on="answer")
    assert bare.same(" 3", text) and not bare.same("x = 3", text)
    optional = make_matcher("regex", r"x(?: = (\d))?", take="last")
    assert optional.read_answer("x = 1, x") == "1" and optional.read_answer("x") is None


def test_the_ways_by_name() -> None:
    for match, expected, answer, other in (
        ("text", " a b", "a b\n", "a  b"),
        ("json", '{"a": 1, "b": [2]}', '{"b":[2],"a":1.0}', 'So: {"b":[2],"a":1}'),
        ("json_in_text", '{"a": 1, "b": [2]}', 'So: {"b":[2],"a":1}', "{"),
        ("gsm8k", "1 + 1 = 2\n#### 2", "It is $2.00.", "#### 3"),
        ("letter", "B", "(b) Paris", "a"),
    ):
        matcher = AnswerConfig(match=match).matcher()  # type: ignore[arg-type]
        assert matcher.same(expected, answer) and not matcher.same(expected, other), match


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(match="regex"), "match is regex and no pattern is given; --match regex and --pattern go together"),
        (dict(pattern="(a)"), "match is text and a pattern is given"),
        (dict(match="regex", pattern="(a"), r"pattern is '\(a', not a regular expression \(missing \)"),
        (dict(match="regex", pattern="a"), "with 0 groups; give --pattern exactly one group"),
        (dict(match="regex", pattern="(a)(b)"), "with 2 groups"),
        (dict(match="fuzzy"), "match is 'fuzzy'; choose one of text, json"),
    ],
)
def test_wrong_settings_are_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AnswerConfig(**options)
