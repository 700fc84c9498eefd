"""Parse the command line and YAML files into settings.

The flags come from the dataclasses (field `max_length` is the flag `--max-length`), a `--config` file holds the
same flat names, and the docstring under a field is its help text.
"""

from __future__ import annotations

import copy
import difflib
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from qlora.config.fields import to_text
from qlora.config.settings import hints_of
from qlora.system.errors import InputError

T = TypeVar("T")


def parse_args(config_class: type[T], prog: str, argv: Sequence[str] | None = None) -> T:
    """Build a config from the command line, with an optional YAML file below it.

    The file becomes flags placed before the given ones: the same types and checks, and the command line wins.

    Raises:
        InputError: unreadable YAML, an unknown key (with the closest name), a value out of range.
        SystemExit: the flags themselves are wrong (code 2) or --help was asked for.
    """
    import tyro

    args = [_NEGATIONS.get(arg, arg) for arg in (sys.argv[1:] if argv is None else argv)]
    args, file = _take_config_flag(args)
    if file is not None:
        args = config_file_flags(file, _field_names(config_class)) + args
    with _lists_as_text():
        return tyro.cli(
            config_class,
            prog=prog,
            args=args,
            description=f"{config_class.__doc__} A YAML file of the same names may be given with --config FILE.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )


def _lists_as_text() -> Any:
    """Tyro's rule for our lists and maps: one argument, which the settings read (`qlora.config.fields`)."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> Any:
        kind = get_origin(info.type)
        if kind not in (list, dict):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda args: args[0],
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [to_text(value)],
        )

    return registry


# The documented spelling of "no 4 bits"; the generated one is --no-use-4bit.
_NEGATIONS = {"--no-4bit": "--no-use-4bit", "--use_4bit": "--use-4bit"}


def _take_config_flag(args: list[str]) -> tuple[list[str], str | None]:
    for position, arg in enumerate(args):
        if arg == "--config":
            if position + 1 == len(args):
                raise InputError("--config needs a file; give it the path of a YAML file.")
            return args[:position] + args[position + 2 :], args[position + 1]
        if arg.startswith("--config="):
            return args[:position] + args[position + 1 :], arg.partition("=")[2]
    return args, None


def _field_names(config_class: type) -> dict[str, Any]:
    """Flat name -> type (that of its values: `list` of a list), through one level of nesting."""
    names: dict[str, Any] = {}
    for name, hint in hints_of(config_class).items():
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        names.update(_field_names(kind) if is_dataclass(kind) else {name: get_origin(kind) or kind})  # type: ignore[arg-type]
    return names


def config_file_flags(file: str, names: dict[str, Any]) -> list[str]:
    """Read a flat YAML file as command-line flags; `names` are the keys it may hold."""
    flags: list[str] = []
    lines: dict[str, int] = {}
    for key, value, line in _read_yaml(file):
        name, where = str(key).replace("-", "_"), f"{file}:{line}"
        if name not in names:
            raise InputError(f"{where}: unknown key {reprlib.repr(key)}; {_nearest(name, names)}")
        if name in lines:
            raise InputError(f"{where}: {name} was given in line {lines[name]} already; remove one of them.")
        lines[name] = line
        flag = name.replace("_", "-")
        if names[name] is bool:
            if not isinstance(value, bool):
                raise InputError(f"{where}: {key} is {reprlib.repr(value)}; write true or false.")
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list) and names[name] is list and all(_is_plain(v) for v in value):
            flags.append(f"--{flag}={','.join(map(str, value))}")
        elif isinstance(value, dict) and names[name] is dict:
            flags.append(f"--{flag}={to_text(value)}")
        elif isinstance(value, (dict, list, set, bytes)):
            raise InputError(f"{where}: {key} is a {type(value).__name__}; write a single value.")
        elif value is not None:
            if isinstance(value, bool):  # YAML reads a bare on or off as a boolean
                value = "on" if value else "off"
            flags.append(f"--{flag}={value}")
    return flags


def _nearest(name: str, names: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(names))}."


def with_settings(config: T, settings: Mapping[str, Any]) -> T:
    """A copy of a config, changed in the settings given by the names that flags and YAML have for them.

    Raises:
        InputError: an unknown name (with the closest), a value of another type or out of range.
    """
    names = _field_names(type(config))
    for name in settings:
        if name not in names:
            raise InputError(f"unknown setting {name!r}; {_nearest(name, names)}")
    changed = copy.deepcopy(config)
    for item in fields(changed):  # type: ignore[arg-type]
        value = getattr(changed, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            mine = {each.name: settings[each.name] for each in fields(value) if each.name in settings}
            setattr(changed, item.name, replace(value, **mine) if mine else value)
        elif item.name in settings:
            setattr(changed, item.name, settings[item.name])
    return changed


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _read_yaml(file: str) -> list[tuple[Any, Any, int]]:
    """(key, value, line) of a YAML mapping, doubled keys included."""
    import yaml

    try:
        loader = yaml.SafeLoader(Path(file).read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if node is not None and not isinstance(node, yaml.MappingNode):
            kind = "list" if isinstance(node, yaml.SequenceNode) else "text alone"
            raise InputError(f"The config file {file} holds {kind}; write one `name: value` a line.")
        return [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True), line + 1)
            for key, value in (node.value if node is not None else ())
            for line in (key.start_mark.line,)
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {file} cannot be read ({error}); check path and encoding.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"The config file {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, OverflowError) as error:  # a date or number that YAML recognizes but Python cannot hold
        if isinstance(error, InputError):
            raise
        raise InputError(f"The config file {file} holds a value that does not exist: {error}.") from error
