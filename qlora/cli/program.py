"""The name under which the command was started."""

from __future__ import annotations

import sys
from pathlib import Path


def program(command: str = "") -> str:
    """`qlora COMMAND` as help pages show it: `qlora` for the installed command, `python -m qlora` otherwise."""
    name = "qlora" if Path(sys.argv[0]).stem == "qlora" else "python -m qlora"
    return f"{name} {command}".rstrip()
