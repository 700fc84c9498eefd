"""Helpers for settings: text with commas, patterns of layer names, sizes in bytes."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

from qlora.system.errors import InputError

# Text with commas on the command line; a list, or a mapping to numbers, in YAML and Python.
LIST_FIELDS, PATTERN_FIELDS = (
    ("target_modules", "modules_to_save", "new_tokens", "data", "data_weights", "report_to"),
    ("rank_pattern", "alpha_pattern", "columns"),
)


def split_names(names: str) -> list[str]:
    return [name for name in (part.strip() for part in names.split(",")) if name]


@lru_cache(maxsize=64)
def read_pattern(field: str, text: str) -> dict[str, float]:
    """name=number,... as a dict; a name may be a regular expression, as in PEFT."""
    flag = "--" + field.replace("_", "-")
    numbers: dict[str, float] = {}
    entries = re.split(r",(?=[^,]*=)", text) if text.strip() else []
    if len(entries) > 4096:  # an entry for each layer of the largest model is a thousand
        raise InputError(f"{field} holds {len(entries)} entries; give {flag} 4096 at most.")
    for entry in entries:
        key, _, number = entry.strip().rpartition("=")
        try:
            # A repeated group, or a dozen repeats, can take for ever to fail; names in a model need none.
            if not key or len(key) > 200 or re.search(r"\)\s*[*+?{]", key) or len(re.findall(r"[*+?{]", key)) > 4:
                raise ValueError
            re.compile(key)
            numbers[key] = float(number)
            if not 0 < numbers[key] < math.inf:
                raise ValueError
        except (ValueError, OverflowError, RecursionError, re.error) as error:
            raise InputError(
                f"{field} holds {entry[:60]!r}; give {flag} as name=number,... with numbers above 0 and names, or "
                "patterns with at most 4 repeats."
            ) from error
    return numbers


def join_fields(config: Any) -> None:
    """Lists and mappings, as Python gives them, become the text of the command line."""
    for name in LIST_FIELDS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, str):
            setattr(config, name, ",".join(map(str, value)))
    for name in PATTERN_FIELDS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, str):
            setattr(config, name, ",".join(f"{key}={item}" for key, item in value.items()))


@lru_cache(maxsize=8192)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def fits_pattern(layer: str, pattern: str) -> bool:
    """Whether a layer's name, or its end after a dot, is `pattern`, read as a regular expression (PEFT's rule)."""
    return _compile_pattern(pattern).fullmatch(layer) is not None


def size_in_bytes(text: str) -> int | None:
    """4GiB, 3.5GB, 800 MiB in bytes; None where it says no size."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([MGT])(i?)B", text)
    if match is None or not float(match[1]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (2 + "MGT".index(match[2])))
