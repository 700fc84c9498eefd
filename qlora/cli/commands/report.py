"""Write the report page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from qlora.cli.program import program
from qlora.config.parse import parse_args


@dataclass
class ReportConfig:
    """Write the report page of a run, finished or not: curves, samples and settings in one file."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT_DIR")]
    """Output directory of a run."""
    output: str | None = None
    """Output file; default: OUTPUT_DIR/report.html."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(ReportConfig, program("report"), argv)
    from qlora.report.page import write_report

    print(write_report(config.directory, config.output))
