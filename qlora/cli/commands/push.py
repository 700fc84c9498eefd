"""Upload an adapter, a merged model or a .gguf file to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class PushConfig:
    """Upload an adapter, a merged model or a .gguf file to the Hugging Face hub, with a model card."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    """Output directory of a run, a merge or an export."""
    repo: str | None = None
    """Repository on the hub, as owner/name; created if missing."""
    private: bool = False
    """Create a new repository as private."""
    exact_match: str | None = None
    """File written by python -m eval exact_match --output, for the model card."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(PushConfig, program("push"), argv)
    if config.repo is None:
        raise InputError("No repository given; pass --repo owner/name.")
    from qlora.export.hub import push_to_hub

    print(push_to_hub(config.directory, config.repo, config.private, exact_match=config.exact_match))
