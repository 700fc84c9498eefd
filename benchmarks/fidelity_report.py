"""Tables and pictures of a fidelity study, from the files that are there."""
from __future__ import annotations
import re
from pathlib import Path

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def same_number(expected: str, answer: str) -> bool:
    """GSM8K's rule: equal numbers after "####", or else the last ones."""

    def read(text: str) -> float | None:
        found = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else NUMBER.findall(text)[-1:]
        return float(found[0].replace(",", "")) if found else None

    return (number := read(expected)) is not None and read(answer) == number


def write_report(directory: Path, page: Path | None) -> None: ...
