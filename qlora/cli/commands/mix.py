"""Mix adapters of one base into a new one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class MixConfig:
    """Mix adapters of one base into a new one, without loading the base."""

    adapters: tuple[str, ...] = ()
    """Adapter directories."""
    weights: tuple[float, ...] = ()
    """One factor per adapter, negative to subtract; default: all 1."""
    method: Literal["cat", "svd", "linear"] = "cat"
    """cat: the exact weighted sum (ranks add up); svd: the closest adapter of --rank; linear: as in PEFT."""
    rank: int | None = None
    """Rank for svd; default: the largest among the adapters."""
    output_dir: str = "mixed"
    """Output directory; must not exist."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(MixConfig, program("mix"), argv)
    if not config.adapters:
        raise InputError("No adapters given; pass --adapters with the directories to mix.")
    from qlora.adapters.mix import mix_adapters

    weights = config.weights or (1.0,) * len(config.adapters)
    error = mix_adapters(config.adapters, weights, config.output_dir, config.method, config.rank)
    accuracy = {
        "cat": "the exact weighted sum",
        "svd": f"{math.sqrt(max(0.0, 1 - error**2)):.2%} of the norm of the weighted sum kept",
        "linear": f"PEFT's linear mix, which differs from the weighted sum by {error:.0%} of its norm",
    }
    print(f"Mixed adapter saved to {config.output_dir}: {accuracy[config.method]}")
