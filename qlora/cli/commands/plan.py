"""Estimate the memory and time of a run before starting it."""

from __future__ import annotations

from collections.abc import Sequence

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.config.plan import PlanConfig


def main(argv: Sequence[str]) -> None:
    config = parse_args(PlanConfig, program("plan"), argv)
    from qlora.api import start_planner
    from qlora.cli.show_plan import print_plan

    print_plan(*start_planner(config))
