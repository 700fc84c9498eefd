"""The base class of all settings: it reads and checks a value whenever it is set.

A group is a dataclass whose fields declare their type and range:

    @dataclass
    class LoRAConfig(Settings):
        rank: Annotated[int, at_least(1, "a whole number of 1 or more")] = 8

`LoRAConfig(rank=0)` and `config.rank = 0` both raise "rank is 0; give --rank a whole number of 1 or more.". Checks
across fields are in `check`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from qlora.config.fields import (
    flag_of,
    read_alphas,
    read_columns,
    read_layers,
    read_names,
    read_numbers,
    read_ranks,
    read_sources,
    read_targets,
)
from qlora.system.errors import InputError

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
NUMBERS: dict[type, type] = {int: Integral, float: Real}


@dataclass(frozen=True)
class Check:
    """A range: what a message asks for, and whether a value of the field's type lies in it."""

    wanted: str
    fits: Callable[[Any], bool]


def at_least(low: float, wanted: str = "", infinite: bool = False) -> Check:
    """`low` or more; infinity only where it means something."""
    return Check(wanted or f"{low} or more", lambda x: low <= x and (infinite or x < math.inf))


def between(low: float, high: float, wanted: str) -> Check:
    """From `low` up to, not including, `high`."""
    return Check(wanted, lambda x: low <= x < high)


@dataclass(frozen=True)
class Read:
    """How a list or map is read: (name of the field, text or collection) -> the value."""

    read: Callable[[str, Any], Any]


Names = Annotated[list[str], Read(read_names)]
Targets = Annotated[list[str], Read(read_targets)]
Sources = Annotated[list[str], Read(read_sources)]
Numbers = Annotated[list[float], Read(read_numbers)]
Layers = Annotated[list[int], Read(read_layers)]
Ranks = Annotated[dict[str, int], Read(read_ranks)]
Alphas = Annotated[dict[str, float], Read(read_alphas)]
Columns = Annotated[dict[str, str], Read(read_columns)]

ABOVE_ZERO = Check("a number above 0", lambda x: 0 < x < math.inf)
Count = Annotated[int, at_least(0)]  # 0 often means never or all
Positive = Annotated[int, at_least(1)]


@lru_cache(maxsize=64)
def hints_of(group: type) -> dict[str, Any]:
    """The type of each field of a dataclass, with its `Annotated`."""
    hints = get_type_hints(group, include_extras=True)
    return {item.name: hints[item.name] for item in fields(group)}  # type: ignore[arg-type]


class Settings:
    """The base of the groups.

    Raises:
        InputError: a value that is set has the wrong type or range, or does not go with the others.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        hints, before = hints_of(type(self)), dict(self.__dict__)  # type: ignore[arg-type]
        if name not in hints:
            raise InputError(f"Unknown setting {name!r}; {type(self).__name__} has {', '.join(hints)}.")
        super().__setattr__(name, read_value(name, hints[name], value))
        if hints.keys() <= self.__dict__.keys():
            try:
                self.check()
            except InputError:
                self.__dict__.clear()
                self.__dict__.update(before)
                raise

    def check(self) -> None:
        """Check what needs several fields; called once all are set, and whenever one changes."""


def read_value(name: str, hint: Any, value: Any) -> Any:
    """The value of a field of this type.

    Raises:
        InputError: it has another type, or lies outside the range.
    """
    check: Check | None = None
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, Read):
                return note.read(name, value)
            check = note if isinstance(note, Check) else check
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{name} is {value!r:.80}; choose one of {', '.join(get_args(kind))}.")
        return value
    kind = get_origin(kind) or kind
    if kind in NUMBERS and isinstance(value, NUMBERS[kind]) and not isinstance(value, bool):
        value = kind(value)  # numpy's, too
    elif kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (check is not None and not check.fits(value)):
        wanted = check.wanted if check is not None else WORDS.get(kind, f"a {kind.__name__}")
        raise InputError(f"{name} is {value!r:.80}; give {flag_of(name)} {wanted}.")
    return value
