"""Read the files of a run, complete or not, for display."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG
from qlora.system.files import read_json, whole_lines

LARGEST = 1e15  # largest number to draw


@dataclass
class Run:
    """The contents of a run's files; invalid sections are empty.

    Attributes:
        scores: names of numbers other than the held-out loss in evaluation lines.
        notes: what could not be read.
    """

    directory: Path
    settings: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    adapter: dict[str, Any]
    scores: list[str]
    notes: list[str]
    _columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def setting(self, section: str, name: str) -> Any:
        return self.settings.get(section, {}).get(name)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one key in the training lines, where its value is a number."""
        if name not in self._columns:
            self._columns[name] = _column(self.training, name)
        return self._columns[name]

    def held_out(self, name: str = "eval_loss") -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one key in the evaluation lines, where its value is a number."""
        return _column(self.evaluations, name)

    def fact(self, *names: str) -> Any:
        """A number from the nested facts, or None."""
        value: Any = self.facts
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value if is_number(value) else None

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.training + self.skipped), default=0)

    @property
    def total_steps(self) -> int | None:
        """Number of steps in the settings; None if unknown."""
        train = self.settings.get("train", {})
        if is_number(train.get("max_steps")) and train["max_steps"] > 0:
            return int(train["max_steps"])
        per_step = [train.get("batch_size"), train.get("grad_accum"), self.fact("num_processes")]
        epochs, examples = train.get("epochs"), self.fact("examples", "num_train")
        if not all(is_number(count) and count >= 1 for count in (*per_step, epochs, examples)):
            return None
        return int(epochs * -(-examples // math.prod(per_step)))


def is_number(value: Any) -> bool:
    """Whether it is a finite number, small enough to draw."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _column(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    steps = np.fromiter((line["step"] for line in lines), dtype=np.int64, count=len(lines))
    values = [line.get(name) for line in lines]
    numbers = np.array([value if is_number(value) else np.nan for value in values], dtype=np.float64)
    found = ~np.isnan(numbers)
    return steps[found], numbers[found]


def read_run(directory: Path) -> Run:
    """Read the files of a run.

    Raises:
        InputError: the directory holds no file of a run.
    """
    metrics, notes = directory / "metrics.jsonl", []
    if not metrics.is_file() and not (directory / "run.json").is_file():
        raise InputError(
            f"{directory} holds no run (no metrics.jsonl or run.json); pass the --output-dir of a run."
        )
    content: dict[str, dict[str, Any]] = {"run.json": {}, CONFIG: {}}
    for name in content:
        if (directory / name).is_file():
            try:
                content[name] = read_json(directory / name, "it is left out here")
            except InputError as error:
                notes.append(str(error))
    run = content["run.json"]
    lines = [line for line in whole_lines(metrics) if is_step(line.get("step"))]
    training = [line for line in lines if is_number(line.get("loss"))]
    evaluations = [line for line in lines if is_number(line.get("eval_loss"))]
    skipped = [line for line in lines if "loss" in line and not is_number(line["loss"])]
    samples = [
        line
        for line in whole_lines(directory / "samples.jsonl")
        if is_step(line.get("step")) and all(type(line.get(key)) is str for key in ("prompt", "completion"))
    ]
    numbers = [(name, value) for line in evaluations for name, value in line.items() if name != "eval_loss"]
    scores = dict.fromkeys(
        name for name, value in numbers if type(value) is float and is_number(value)
    )  # no counts
    return Run(
        directory=directory,
        settings={k: v for k, v in run.items() if isinstance(v, dict) and k != "facts"},
        facts=run["facts"] if isinstance(run.get("facts"), dict) else {},
        training=training,
        evaluations=evaluations,
        skipped=skipped,
        samples=samples,
        adapter=content[CONFIG],
        scores=[name for name in scores if re.fullmatch(r"[\w.-]{1,40}", name)],
        notes=notes,
    )
