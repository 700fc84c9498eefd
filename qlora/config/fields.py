"""Lists and maps among the settings, and their text on the command line: q_proj,v_proj and name=4,other=8.

A field that holds a list or a map also accepts its text, from flags, YAML and Python; the `read_...` functions
accept both. `to_text` converts back, for run.json, checkpoints and the defaults in --help.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from qlora.system.errors import InputError

MAX_ENTRIES = 4096  # the largest models need about a thousand, one per layer


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def split_names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def read_names(field: str, value: Any) -> list[str]:
    """Text with commas, or a collection of names; a set in alphabetical order."""
    if isinstance(value, (str, os.PathLike)):
        return split_names(os.fspath(value))
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, (str, os.PathLike)) for name in value):
        raise InputError(f"{field} is {value!r:.80}; give {flag_of(field)} names separated by commas.")
    return [os.fspath(name) for name in value]


def read_targets(field: str, value: Any) -> list[str]:
    """As `read_names`, of layers: a name, or a regular expression (text with a special character, or re.Pattern).

    Raises:
        InputError: a pattern that is none, that holds a comma, or that can take forever to fail.
    """
    if isinstance(value, re.Pattern):
        value = [value]
    if isinstance(value, (list, tuple, set, frozenset)):
        value = type(value)(name.pattern if isinstance(name, re.Pattern) else name for name in value)
    names = read_names(field, value)
    for name in filter(is_pattern, names):
        try:
            check_pattern(name)
            if "," in name:
                raise ValueError
        except (ValueError, RecursionError, re.error) as error:
            raise InputError(
                f"{field} holds {name[:60]!r}; give {flag_of(field)} names, or regular expressions without a "
                "comma and with at most 4 repeats."
            ) from error
    return names


def is_pattern(target: str) -> bool:
    """Whether the name of a layer is meant as a regular expression."""
    return re.search(r"[*+?()\[\]{}|^$\\]", target) is not None


def names_layer(layer: str, target: str) -> bool:
    """Whether `target` means this layer: its full name, its last name(s), or a pattern for either."""
    if is_pattern(target):
        return fits_pattern(layer, target)
    return layer == target or layer.endswith("." + target)


def read_sources(field: str, value: Any) -> list[str]:
    """As `read_names`; the name of a file may hold a comma. None: no source."""
    if isinstance(value, (str, os.PathLike)) and os.path.exists(value):
        return [os.fspath(value)]
    return [] if value is None else read_names(field, value)


def read_numbers(field: str, value: Any) -> list[float]:
    """Text with commas, a number, or a collection of them."""
    try:
        items = split_names(value) if isinstance(value, str) else value
        return [float(number) for number in (items if isinstance(items, Iterable) else [items])]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{field} is {value!r:.80}; give {flag_of(field)} numbers separated by commas."
        ) from error


def read_layers(field: str, value: Any) -> list[int]:
    """Numbers and ranges as text (0,2,4-7), or a collection of numbers."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset, range)) else str(value)
    numbers: list[int] = []
    for part in split_names(text):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InputError(
                f"{field} is {value!r:.80}; give {flag_of(field)} numbers and ranges, such as 0,2,4-7."
            )
        numbers += range(first, last + 1)
    return numbers


def read_alphas(field: str, value: Any) -> dict[str, float]:
    """name=number,... or a mapping; a name may be a regular expression, as in PEFT."""
    if isinstance(value, Mapping):
        entries = [(key, number) for key, number in value.items()]
    else:
        texts = re.split(r",(?=[^,]*=)", str(value)) if str(value).strip() else []
        entries = [(key.strip(), number) for key, _, number in (text.rpartition("=") for text in texts)]
    if len(entries) > MAX_ENTRIES:
        raise InputError(f"{field} holds {len(entries)} entries; give {flag_of(field)} {MAX_ENTRIES} at most.")
    numbers: dict[str, float] = {}
    for key, number in entries:
        try:
            check_pattern(key)
            numbers[key] = float(number)
            if not 0 < numbers[key] < math.inf:
                raise ValueError
        except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
            raise InputError(
                f"{field} holds {f'{key}={number}'[:60]!r}; give {flag_of(field)} as name=number,... with numbers "
                "above 0 and names, or patterns with at most 4 repeats."
            ) from error
    return numbers


def read_ranks(field: str, value: Any) -> dict[str, int]:
    """As `read_alphas`, of whole numbers."""
    numbers = read_alphas(field, value)
    for key, number in numbers.items():
        if number != int(number):
            raise InputError(f"{field} gives {key} the rank {number}; give a whole number.")
    return {key: int(number) for key, number in numbers.items()}


@lru_cache(maxsize=8192)
def check_pattern(pattern: str) -> None:
    """Raise for what is no regular expression, or can take forever to fail.

    A repeated group, or a dozen repeats, can; names in a model need none.
    """
    if not pattern or len(pattern) > 200 or re.search(r"\)\s*[*+?{]", pattern):
        raise ValueError
    if len(re.findall(r"[*+?{]", pattern)) > 4:
        raise ValueError
    re.compile(pattern)


def read_columns(field: str, value: Any) -> dict[str, str]:
    """name=column,... or a mapping; a comma or = may stand in a column's name."""
    if isinstance(value, Mapping):
        texts = [f"{key}={column}" for key, column in value.items()]
    else:
        texts = re.split(r",(?=\s*\w+\s*=)", str(value)) if str(value).strip() else []
    names: dict[str, str] = {}
    for text in texts:
        key, _, column = (part.strip() for part in text.partition("="))
        if not key or not column or key in names:
            raise InputError(f"{field} holds {text!r:.80}; give {flag_of(field)} name=column,... each name once.")
        names[key] = column
    return names


def to_text(value: Any) -> Any:
    """A list or a map as its text; anything else as it is. Of whole numbers three or more in a row are a range."""
    if isinstance(value, dict):
        return ",".join(f"{key}={_number(item)}" for key, item in value.items())
    if not isinstance(value, list):
        return value
    parts: list[list[Any]] = []
    for item in value:
        if parts and type(item) is int and item == parts[-1][-1] + 1:
            parts[-1].append(item)
        else:
            parts.append([item])
    return ",".join(
        f"{part[0]}-{part[-1]}" if len(part) > 2 else ",".join(map(str, map(_number, part))) for part in parts
    )


def _number(item: Any) -> Any:
    return int(item) if type(item) is float and item.is_integer() else item


@lru_cache(maxsize=8192)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def fits_pattern(layer: str, pattern: str) -> bool:
    """Whether a layer's name, or its end after a dot, is `pattern`, read as a regular expression (PEFT's rule)."""
    return _compile_pattern(pattern).fullmatch(layer) is not None


def layer_number(name: str) -> int | None:
    """The decoder layer that a layer is in, counted from 0: the first number in its name; None: in none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def size_in_bytes(text: str) -> int | None:
    """4GiB, 3.5GB, 800 MiB in bytes; None where it says no size."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([MGT])(i?)B", text)
    if match is None or not float(match[1]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (2 + "MGT".index(match[2])))
