"""Show what is in an adapter and how large its update is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from qlora.cli.program import program
from qlora.config.parse import parse_args


@dataclass
class InspectConfig:
    """Show what is in an adapter and how large its update is, by layer and module."""

    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """Adapter directory."""
    picture: str | None = None
    """Plot the update sizes to this .png file."""
    model: str | None = None
    """The base: gives sizes relative to its weights, and the whole update of a DoRA adapter."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(InspectConfig, program("inspect"), argv)
    from qlora.adapters.inspect import inspect_adapter
    from qlora.cli.show_inspection import draw_inspection, print_inspection

    found = inspect_adapter(config.adapter, config.model)
    print_inspection(found)
    if config.picture:
        draw_inspection(found, config.picture)
