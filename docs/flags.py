"""Write docs/flags.md, the table of every flag of a training run, from the config classes.

    python -m docs.flags [--output docs/flags.md]

A flag's name, values, default and meaning are read from the dataclasses alone, so the page cannot fall behind. It
imports neither torch nor the command-line parser.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qlora.config.run import RunConfig

PAGE = Path(__file__).parent / "flags.md"
NONE = "—"
INTRODUCTION = """\
# Flags of train.py

<!-- Written by `python -m docs.flags`; edit the comments in qlora/config instead. -->

`python train.py`, `qlora train`, `python -m qlora train` and, for `--prompt`, `qlora generate` take these flags. A
YAML file given with `--config FILE` takes the same names, with underscores or hyphens; a flag on the command line
overrides the file. `qlora.train(...)` takes the same names as keywords.

`qlora COMMAND --help` and `python -m eval COMMAND --help` list the flags of the other commands.
"""
NEGATIONS = {"use_4bit": "no-4bit"}  # the documented spelling where it is not `no-` and the name
TYPES = {int: "integer", float: "number", str: "text", bool: "switch"}


@dataclass(frozen=True)
class Flag:
    """One row: the flag as typed, its values, its default as it is written, its meaning."""

    name: str
    values: str
    default: str
    help: str

    def row(self) -> str:
        cells = (self.name, self.values, self.default, self.help.replace("|", "\\|"))
        return f"| {' | '.join(cells)} |"


def field_comments(config: type) -> dict[str, str]:
    """Field -> the string literal below it in the source of the class or its bases, on one line."""
    comments: dict[str, str] = {}
    for part in filter(is_dataclass, reversed(config.__mro__)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for item, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(below, ast.Expr)
            ):
                comments[item.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return comments


def default_of(item: Field[Any]) -> Any:
    """The default of a field, from its factory if it has one."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def show_value(value: Any) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    if isinstance(value, Mapping):
        value = ",".join(f"{key}={item}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return NONE if value is None or value == "" else f"`{value}`"


def show_type(kind: Any) -> str:
    """The choices of a Literal, or a word for the type."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    origin = get_origin(kind) or kind
    if origin in (list, tuple):
        return "list"
    return "name=value list" if origin is dict else TYPES[origin]


def flags_of(config: type) -> Iterator[Flag]:
    """The flags of one group of settings, in the order of its fields."""
    comments, hints = field_comments(config), get_type_hints(config)
    for item in fields(config):
        default = default_of(item)
        if is_dataclass(default):
            continue
        flag = item.name.replace("_", "-")
        name = f"`--{flag}`"
        if isinstance(default, bool):
            name += f" / `--{NEGATIONS.get(item.name, f'no-{flag}')}`"
        yield Flag(name, show_type(hints[item.name]), show_value(default), comments[item.name])


def groups(config: type) -> Iterator[type]:
    """The groups of settings below a config, depth first, then the config itself."""
    for item in fields(config):
        default = default_of(item)
        if is_dataclass(default):
            yield from groups(type(default))
    yield config


def heading_of(group: type) -> tuple[str, str]:
    """(what a group of settings is for, what its docstring says beyond that), from the docstring's first line."""
    purpose, _, note = (group.__doc__ or "").partition("\n")[0].partition(". ")
    return purpose.rstrip("."), note


def flags_page() -> str:
    """The text of docs/flags.md."""
    parts = [INTRODUCTION]
    for group in groups(RunConfig):
        title, note = ("Every command", "") if group is RunConfig else heading_of(group)
        rows = [flag.row() for flag in flags_of(group)]
        if group is RunConfig:
            rows.append(Flag("`--config`", "text", NONE, "YAML file of the same names.").row())
        head = "| flag | values | default | what it does |\n| --- | --- | --- | --- |"
        parts.append("\n".join((f"## {title}\n", *([f"{note}\n"] if note else []), head, *rows)) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.parse_args().output.write_text(flags_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
