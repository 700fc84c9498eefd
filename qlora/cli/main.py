"""The command `qlora`: runs the named command and exits with its code.

Each file of qlora/cli/commands is a command: the file name (with - for _) is its name, `main(argv)` runs it, and
the first line of its docstring appears in `qlora --help`.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

from qlora import __version__
from qlora.cli import commands
from qlora.cli.exits import run
from qlora.cli.program import program
from qlora.system.errors import InputError


def command_modules() -> dict[str, str]:
    """Name of each command -> its module."""
    found = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name.strip("_").replace("_", "-"): f"{commands.__name__}.{name}" for name in found}


def main(argv: Sequence[str]) -> None:
    modules = command_modules()
    if argv and argv[0] in modules:
        import_module(modules[argv[0]]).main(argv[1:])
    elif argv and argv[0] == "--version":
        print(f"qlora {__version__}")
    elif list(argv[:1]) in ([], ["-h"], ["--help"]):
        lines = [f"  {name:<12}{_summary(module)}" for name, module in modules.items()]
        print("\n".join([f"usage: {program()} COMMAND [--help] [OPTIONS]", "", *lines]))
    else:
        raise InputError(f"Unknown command {argv[0]!r}; choose {', '.join(modules)}.")


def _summary(module: str) -> str:
    return (import_module(module).__doc__ or "").partition("\n")[0]


def console() -> int:
    """Entry point of the installed command."""
    return run(main, sys.argv[1:])
