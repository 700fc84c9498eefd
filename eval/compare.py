"""python -m eval compare: a base, its adapters and merged models side by side on the same items.

It answers the prompts of --data with each model, or reads result files of other evaluations (--results), or both.
Each pair of models gets a paired test (pairs.py) and a list of the items won, lost and tied (tables.py).

The base is loaded once for all adapters, except for those that change their base (PiSSA).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qlora.config.parse import parse_args
from qlora.config.settings import Count
from qlora.system.errors import InputError

from . import PROGRAM
from .exact_match import ExactMatchConfig, Question, measure, read_questions, summarize
from .model import EvalConfig, load_evaluated, require
from .pairs import compare_results, settings_that_differ
from .results import check_output, read_result, write_result
from .tables import make_tables, print_tables, to_markdown


@dataclass
class CompareConfig(ExactMatchConfig):
    """Base, adapters and merged models side by side on the same prompts, or existing results."""

    adapter: tuple[str, ...] = ()  # type: ignore[assignment]
    """Adapter directories, each evaluated on the base."""
    merged: tuple[str, ...] = ()
    """More models, such as merged ones, loaded in 16 bits unless they were saved in 4."""
    results: tuple[str, ...] = ()
    """Result files written by --output of exact_match, choice or perplexity."""
    show: Count = 3
    """Number of wins, losses and ties to print per pair; --output and --markdown have all."""
    markdown: str | None = None
    """Also write the tables to this Markdown file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter and self.model is None:
            raise InputError("--adapter needs its base; pass --model.")
        if (self.model is not None) + len(self.adapter) + len(self.merged) + len(self.results) < 2:
            raise InputError("Nothing to compare; pass --model with --adapter or --merged, or two --results.")


@dataclass(frozen=True)
class Side:
    """One of the models or results to compare."""

    name: str
    kind: Literal["base", "adapter", "merged", "results"]
    path: str


def list_sides(config: CompareConfig) -> list[Side]:
    """Everything to compare, with short names: base, or the last part of a path; the whole path if not unique.

    Raises:
        InputError: one is given twice.
    """
    given: list[tuple[Any, str]] = [("base", config.model)] if config.model is not None else []
    given += [("adapter", path) for path in config.adapter] + [("merged", path) for path in config.merged]
    given += [("results", path) for path in config.results]
    short = [
        "base" if kind == "base" else Path(path).stem if kind == "results" else Path(path).name
        for kind, path in given
    ]
    sides = [
        Side(name if short.count(name) == 1 and name else str(Path(path)), kind, path)
        for name, (kind, path) in zip(short, given, strict=True)
    ]
    names = [side.name for side in sides]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is given twice; compare different models.")
    return sides


def measure_sides(
    config: CompareConfig, sides: Sequence[Side], questions: Sequence[Question]
) -> dict[str, dict[str, Any]]:
    """Name -> result of exact_match for each side that is a model; empty except in the main process."""
    from qlora.model.weights import is_stored_in_4bit

    found: dict[str, dict[str, Any]] = {}

    def record(side: Side, loaded: EvalConfig, model: Any, tokenizer: Any, accelerator: Any) -> None:
        predictions = measure(model, tokenizer, questions, config, accelerator)
        if accelerator.is_main_process:
            scores, rows, pairing = summarize(questions, predictions, config, config.seed, config.confidence)
            settings = {**asdict(config), **asdict(loaded)}
            found[side.name] = write_result(None, "exact_match", scores, settings, rows, pairing)

    on_base, alone = [], []
    for side in sides:  # before any measurement, to find a wrong path early
        if side.kind == "merged":
            alone.append((side, _loading(config, model=side.path, use_4bit=is_stored_in_4bit(side.path))))
        elif side.kind == "adapter" and _changes_base(side.path):
            alone.append((side, _loading(config, adapter=side.path)))
        elif side.kind != "results":
            on_base.append(side)
    if on_base:
        _measure_on_one_base(config, on_base, record)
    for side, loaded in alone:
        record(side, loaded, *load_evaluated(loaded))
    return found


def _measure_on_one_base(config: CompareConfig, sides: Sequence[Side], record: Callable[..., None]) -> None:
    """Measure the base, then each adapter on it; frees the base at the end."""
    from qlora.adapters.model import LoRAModel
    from qlora.model.tokenizer import load_tokenizer

    adapters = [side for side in sides if side.kind == "adapter"]
    model, tokenizer, accelerator = load_evaluated(_loading(config), [side.path for side in adapters])
    switching = LoRAModel(model, base_name=config.model or "")
    for side in adapters:  # load all first, to find one that does not fit before any measurement
        switching.load_adapter(side.path, side.name)
    record(sides[0], _loading(config), model, tokenizer, accelerator)
    for side in adapters:
        switching.set_adapter(side.name)
        tokenizer = load_tokenizer(config.model or "", side.path)
        record(side, _loading(config, adapter=side.path), model.eval(), tokenizer, accelerator)


def _loading(config: CompareConfig, **changes: Any) -> EvalConfig:
    """The flags to load one model."""
    values = {item.name: getattr(config, item.name) for item in fields(EvalConfig)}
    return EvalConfig(**{**values, "adapter": None, **changes})


def _changes_base(adapter: str) -> bool:
    from qlora.adapters.peft_files import read_adapter

    saved = read_adapter(adapter)
    return bool(saved.base_shift) or saved.config.init == "pissa"


def main(argv: Sequence[str]) -> None:
    config = parse_args(CompareConfig, f"{PROGRAM} compare", argv)
    check_output(config.output)
    check_output(config.markdown, "markdown")
    sides = list_sides(config)
    names = [side.name for side in sides]
    found_by_name = {side.name: read_result(side.path) for side in sides if side.kind == "results"}
    if len(found_by_name) < len(sides):
        require(config, "data")
        measured = measure_sides(config, sides, read_questions(config))
        if not measured:
            return
        found_by_name |= measured
    pairs, found = compare_results(names, [found_by_name[name] for name in names], config.seed, config.confidence)
    from qlora.system.files import new_file

    if config.output is not None:
        with new_file(Path(config.output)) as file:
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if config.markdown is not None:
        with new_file(Path(config.markdown)) as file:
            file.write_text(to_markdown(make_tables(names, pairs, found, None)), encoding="utf-8")
    print_tables(make_tables(names, pairs, found, config.show))
    differing = settings_that_differ(found["compared"])
    if differing:
        print(f"settings that differ: {'; '.join(differing)}")
    num_tests = sum(len(pair.tests) for pair in pairs)
    if num_tests > 1:
        print(f"p-values are per test, not adjusted for {num_tests} tests")
