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
    _check_aliases(args, _field_names(config_class))
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


# What other tools call a setting -> the flag here.
ALIASES = {
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target lora_target_modules lora_target_linear",
    "model": "base_model model_name model_name_or_path",
    "adapter": "adapter_name_or_path adapter_path",
    "data": "dataset dataset_name train_file datasets",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs num_epochs",
    "max_steps": "iters",
    "learning_rate": "lr",
    "schedule": "lr_scheduler_type lr_scheduler",
    "optim": "optimizer",
    "max_length": "max_seq_length max_seq_len cutoff_len sequence_len",
    "eval_every": "eval_steps steps_per_eval",
    "eval_split": "val_set_size val_size",
    "save_every": "save_steps",
    "keep_last": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "train_on": "mask_history mask_prompt train_on_inputs train_on_prompt assistant_only_loss",
    "gradient_checkpointing": "use_gradient_checkpointing grad_checkpoint",
    "use_4bit": "load_in_4bit quantization_bit",
    "compute_dtype": "bf16 fp16 bnb_4bit_compute_dtype torch_dtype",
    "modules_to_save": "additional_target lora_modules_to_save",
}
_OURS = {alias: name for name, aliases in ALIASES.items() for alias in aliases.split()}
# The same for values.
_VALUES = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "bf16": "bfloat16"}
_VALUES |= {"adamw_8bit": "paged_adamw_8bit", "adamw_bnb_8bit": "paged_adamw_8bit", "fp32": "float32"}
_VALUES |= {"paged_adamw": "paged_adamw_32bit"}


def _check_aliases(args: Sequence[str], names: Mapping[str, Any]) -> None:
    """InputError, with the flag here, for a flag or value by which other tools go, and a value after a switch."""
    for arg, after in zip(args, [*args[1:], ""], strict=False):
        if not arg.startswith("--"):
            continue
        flag, _, given = arg.partition("=")
        name, value = flag[2:].replace("-", "_"), given or after
        if name in names or name.removeprefix("no_") in names:
            if names.get(name) is bool and value.lower() in ("true", "false"):
                switch = flag if value.lower() == "true" else f"--no-{flag[2:]}"
                raise InputError(f"{flag} takes no value; write {switch}.")
            if name in ("optim", "compute_dtype") and value in _VALUES:
                raise InputError(f"{flag} {value} is called {_VALUES[value]} here; write {flag} {_VALUES[value]}.")
        elif (ours := _OURS.get(name)) in names:
            raise InputError(f"{flag} is called --{str(ours).replace('_', '-')} here; see --help for its values.")


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
            if isinstance(value, dict):
                inner = f"write its settings at the left margin, as `{next(iter(value), 'name')}: ...`"
                raise InputError(f"{where}: {reprlib.repr(key)} is a section, and there are none here; {inner}.")
            if value is None:
                raise InputError(f"{where}: {reprlib.repr(key)} has no value and is no setting; remove the line.")
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
    names = list(names)
    if _OURS.get(name) in names:
        return f"it is called {_OURS[name]} here."
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
