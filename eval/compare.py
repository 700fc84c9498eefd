"""python -m eval compare: a base, its adapters and merged models side by side on the same items.

It answers the prompts of --data with each model, or reads what --output of other evaluations wrote (--results), or
both. Each two models are compared by the paired test of their items (scores.py), and the items that one of them
wins, loses or ties are listed.

The base is loaded once and the adapters switch on it; one that changed its base (PiSSA) gets a base of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from eval.exact_match import ExactMatchConfig, Question, measure, read_questions, summarize
from eval.models import EvalConfig, load_evaluated, require, require_at_least
from eval.results import check_output, format_score, read_result, write_result
from eval.scores import Comparison, paired_test
from qlora.config.parse import parse_args
from qlora.system.errors import InputError

OWN_SETTINGS = ("output", "markdown", "results", "show", "debug", "cache", "batch_size")  # change no score
CONTENT = ("prompt", "expected", "words", "bytes")  # of a row: what the item is


@dataclass
class CompareConfig(ExactMatchConfig):
    """Base, adapters and merged models side by side on the same prompts; or results that are there already."""

    adapter: tuple[str, ...] = ()  # type: ignore[assignment]
    """Adapter directories, each measured on the base."""
    merged: tuple[str, ...] = ()
    """Further models as they are stored: merged ones, in 16 bits unless saved in 4."""
    results: tuple[str, ...] = ()
    """Files that --output of exact_match, choice or perplexity wrote, compared as they are."""
    show: int = 3
    """Wins, losses and ties to print of each two models; --output and --markdown hold all."""
    markdown: str | None = None
    """Write the tables to this Markdown file, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "show", 0)
        if self.adapter and self.model is None:
            raise InputError("Adapters are given without their base; pass --model.")
        if (self.model is not None) + len(self.adapter) + len(self.merged) + len(self.results) < 2:
            raise InputError(
                "There are no two things to compare; pass --model with --adapter or --merged, or two --results."
            )


@dataclass
class Table:
    """A table for the terminal and for Markdown."""

    title: str
    headings: list[str]
    rows: list[list[str]]


@dataclass
class Pair:
    """Two models by their places, what the tests say, and the places of the items that the second one wins, ..."""

    first: int
    second: int
    tests: list[Comparison]
    outcomes: dict[str, list[int]]


@dataclass(frozen=True)
class Side:
    """One of the things compared."""

    name: str
    kind: Literal["base", "adapter", "merged", "results"]
    path: str


def list_sides(config: CompareConfig) -> list[Side]:
    """Everything to compare, by short names: base, or the last part of a path; the whole path where two agree.

    Raises:
        InputError: one and the same is given twice.
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


# ---- measuring ----------------------------------------------------------------------------------------------


def measure_sides(
    config: CompareConfig, sides: Sequence[Side], questions: Sequence[Question]
) -> dict[str, dict[str, Any]]:
    """Name -> result of exact_match, for each side that is a model; empty in all processes but the main one."""
    from qlora.model.weights import is_stored_in_4bit

    found: dict[str, dict[str, Any]] = {}

    def record(side: Side, loaded: EvalConfig, model: Any, tokenizer: Any, accelerator: Any) -> None:
        predictions = measure(model, tokenizer, questions, config, accelerator)
        if accelerator.is_main_process:
            scores, rows, pairing = summarize(questions, predictions, config, config.seed, config.confidence)
            settings = {**asdict(config), **asdict(loaded)}
            found[side.name] = write_result(None, "exact_match", scores, settings, rows, pairing)

    on_base, alone = [], []
    for side in sides:  # before anything is measured: a path that is none is found here
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
    """The base, then each adapter on it; the base is given free on the way out."""
    from qlora.adapters.model import LoRAModel
    from qlora.model.tokenizer import load_tokenizer

    model, tokenizer, accelerator = load_evaluated(_loading(config))
    switching = LoRAModel(model, base_model=config.model or "")
    adapters = [side for side in sides if side.kind == "adapter"]
    for side in adapters:  # all of them first: one that does not fit is found before anything is measured
        switching.load_adapter(side.path, side.name)
    record(sides[0], _loading(config), model, tokenizer, accelerator)
    for side in adapters:
        switching.set_adapter(side.name)
        tokenizer = load_tokenizer(config.model or "", side.path)
        record(side, _loading(config, adapter=side.path), model.eval(), tokenizer, accelerator)


def _loading(config: CompareConfig, **changes: Any) -> EvalConfig:
    """The flags by which one model is loaded."""
    values = {item.name: getattr(config, item.name) for item in fields(EvalConfig)}
    return EvalConfig(**{**values, "adapter": None, **changes})


def _changes_base(adapter: str) -> bool:
    from qlora.adapters.peft_files import read_adapter

    saved = read_adapter(adapter)
    return bool(saved.base_shift) or saved.config.init == "pissa"


# ---- comparing ----------------------------------------------------------------------------------------------


def align_rows(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each result's rows in the order of the first one's.

    Items are known by where they stood, the folder left aside: the files may have moved.
    Raises:
        InputError: the results are not of one task, or not of the same items.
    """
    tasks = [result.get("task") for result in results]
    if len(set(tasks)) > 1:
        listed = ", ".join(f"{name} is of {task}" for name, task in zip(names, tasks, strict=True))
        raise InputError(f"Results of one evaluation can be compared, but {listed}.")
    keyed = [_rows_by_item(name, result) for name, result in zip(names, results, strict=True)]
    for name, rows in zip(names[1:], keyed[1:], strict=True):
        for one, other, here, there in ((keyed[0], rows, names[0], name), (rows, keyed[0], name, names[0])):
            missing = [key for key in one if key not in other]
            if missing:
                raise InputError(
                    f"{len(missing)} of the {len(one)} items of {here} are not in {there} ({missing[0]} is the "
                    "first); measure both on the same data."
                )
        for key, row in rows.items():
            for part in CONTENT:
                if keyed[0][key].get(part) != row.get(part):
                    raise InputError(
                        f"The {part} of {key} is not the same in {names[0]} and {name}; measure both on the same "
                        "data."
                    )
    return [[rows[key] for key in keyed[0]] for rows in keyed]


def _rows_by_item(name: str, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    keys = [key for entry in result["pairing"].values() for key in entry]
    for row in result["rows"]:
        origin = row.get("id") if isinstance(row, dict) else None
        if not isinstance(origin, str) or not all(isinstance(row.get(key), (bool, int, float)) for key in keys):
            raise InputError(f"{name} has a row without its id or score; give a file that --output wrote.")
        item = origin.replace("\\", "/").rpartition("/")[2]
        if item in rows:
            raise InputError(f"{name} holds the item {item} twice; give a file that --output wrote.")
        rows[item] = row
    return rows


def compare_pair(
    first: int,
    second: int,
    rows: Sequence[Sequence[dict[str, Any]]],
    pairing: dict[str, Sequence[str]],
    seed: int,
    confidence: float,
) -> Pair:
    """Test two models on the same items, by every score that counts the same in both.

    Args:
        rows: of all models, aligned.
        pairing: score name -> keys in the rows, as in a result; the first one decides who wins an item.
    Raises:
        InputError: no score counts the same in both, as with perplexities per token of other tokenizers.
    """
    a, b = rows[first], rows[second]
    tests = []
    for name, keys in pairing.items():
        weights = [[row[key] for row in side] for side in (a, b) for key in keys[1:]]
        if not weights or weights[0] == weights[1]:
            here, there = ([row[keys[0]] for row in side] for side in (a, b))
            tests.append(paired_test(name, here, there, weights[0] if weights else None, seed, confidence))
    if not tests:
        raise InputError("The models count other tokens, words and bytes, so that no score can be compared.")
    key = pairing[tests[0].name][0]
    gains = [float(there[key]) - float(here[key]) for here, there in zip(a, b, strict=True)]
    outcomes = {
        "wins": sorted((i for i, gain in enumerate(gains) if gain > 0), key=lambda i: -gains[i]),
        "losses": sorted((i for i, gain in enumerate(gains) if gain < 0), key=lambda i: gains[i]),
        "ties": [i for i, gain in enumerate(gains) if gain == 0],
    }
    return Pair(first, second, tests, outcomes)


def compare_results(
    names: Sequence[str], results: Sequence[dict[str, Any]], seed: int = 0, confidence: float = 0.95
) -> tuple[list[Pair], dict[str, Any]]:
    """Each two of the results compared, and everything as a JSON object.

    Raises:
        InputError: results that have nothing in common.
    """
    rows = align_rows(names, results)
    shared = {
        score: keys
        for score, keys in results[0]["pairing"].items()
        if all(result["pairing"].get(score) == keys for result in results)
    }
    if not shared:
        raise InputError(f"{' and '.join(names)} have no score in common; measure both by the same flags.")
    pairs = [compare_pair(i, k, rows, shared, seed, confidence) for i, k in combinations(range(len(results)), 2)]
    key = next(iter(shared.values()))[0]
    items = [
        {
            "id": same[0]["id"],
            **{part: same[0][part] for part in CONTENT if part in same[0]},
            "answers": {name: _answer(row) for name, row in zip(names, same, strict=True)},
            "values": {name: row[key] for name, row in zip(names, same, strict=True)},
        }
        for same in zip(*rows, strict=True)
    ]
    compared = [
        {"name": name, "scores": result["scores"], "settings": result.get("settings", {})}
        for name, result in zip(names, results, strict=True)
    ]
    found = {
        "task": "compare",
        "of": results[0].get("task"),
        "compared": compared,
        "comparisons": [
            {
                "models": [names[pair.first], names[pair.second]],
                "tests": [asdict(test) for test in pair.tests],
                **{kind: [items[i]["id"] for i in places] for kind, places in pair.outcomes.items()},
            }
            for pair in pairs
        ],
        "items": items,
    }
    return pairs, found


def _answer(row: dict[str, Any]) -> Any:
    """What a model said to an item: of several samples the first, and how many were right; None without words."""
    samples = row.get("samples")
    if isinstance(samples, list) and samples:
        right = sum(isinstance(sample, dict) and bool(sample.get("correct")) for sample in samples)
        return f"{right} of {len(samples)} right, the first: {row.get('answer')}"
    return row.get("chosen", row.get("answer"))  # of a choice, "answer" is the right one's number


# ---- showing ------------------------------------------------------------------------------------------------


def make_tables(
    names: Sequence[str], pairs: Sequence[Pair], found: dict[str, Any], show: int | None
) -> list[Table]:
    """Scores, tests, and of each pair the items won, lost and tied.

    Args:
        show: so many of each; None = all.
    """
    scores = [
        [entry["name"], score["name"], *_figures(score), str(score["num_samples"])]
        for entry in found["compared"]
        for score in entry["scores"]
    ]
    tables = [Table("Scores", ["model", "score", "value", "interval", "items"], scores)]
    tests = []
    for pair in pairs:
        for test in pair.tests:
            is_share = test.method.startswith("McNemar")
            gain = f"{test.difference:+.1%}" if is_share else f"{test.difference:+.4g}"
            counts = f"{test.wins} / {test.losses} / {test.ties}"
            who = f"{names[pair.second]} − {names[pair.first]}"
            interval = _interval(test.low, test.high, is_share)
            tests.append([who, test.name, gain, interval, f"{test.p_value:.2g}", counts])
    methods = ", ".join(dict.fromkeys(test.method for pair in pairs for test in pair.tests))
    headings = ["models", "score", "difference", "interval", "p", "won / lost / tied"]
    tables.append(Table(f"Paired tests ({methods})", headings, tests))
    for pair in pairs:
        first, second = names[pair.first], names[pair.second]
        rows = [
            [kind, *_item_cells(found["items"][i], first, second)]
            for kind, places in zip(("win", "loss", "tie"), pair.outcomes.values(), strict=True)
            for i in places[:show]
        ]
        counts = ", ".join(f"{len(places)} {kind}" for kind, places in pair.outcomes.items())
        if rows:
            headings = [f"{second}'s", "item", "prompt", "expected", first, second]
            tables.append(Table(f"{second} against {first}: {counts}", headings, rows))
    return tables


def _figures(score: dict[str, Any]) -> list[str]:
    is_share = score["method"] == "Wilson"
    return [format_score(score["value"], is_share), _interval(score["low"], score["high"], is_share)]


def _interval(low: float | None, high: float | None, is_share: bool) -> str:
    return "—" if low is None else f"{format_score(low, is_share)} to {format_score(high, is_share)}"


def _item_cells(item: dict[str, Any], first: str, second: str) -> list[str]:
    """Item, prompt, expected, and what the two said; where there are no words, their scores."""
    said = [item["answers"][name] for name in (first, second)]
    if said == [None, None]:
        said = [format_score(float(item["values"][name]), False) for name in (first, second)]
    return [
        item["id"].rpartition("/")[2],
        *(str(cell) for cell in (item.get("prompt", ""), item.get("expected", ""), *said)),
    ]


def settings_that_differ(compared: Sequence[dict[str, Any]]) -> list[str]:
    """Name and values of each flag that the results were not all made with."""
    settings = [entry["settings"] for entry in compared]
    names = dict.fromkeys(name for each in settings for name in each if name not in OWN_SETTINGS)
    values = {name: [each.get(name) for each in settings] for name in names}
    return [f"{name}: {', '.join(map(str, v))}" for name, v in values.items() if any(x != v[0] for x in v)]


def print_tables(tables: Iterable[Table]) -> None:
    from rich import table as rich_table
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for table in tables:
        is_of_items = table.headings[1] == "item"  # long texts: on a screen one below the other
        shown = rich_table.Table(title=Text(table.title), title_justify="left", show_header=not is_of_items)
        for heading in table.headings[:2] if is_of_items else table.headings:
            shown.add_column(Text(heading), overflow="fold")
        for row in table.rows:
            cells = [" ".join(cell.split()) for cell in row]
            texts = [Text(cell if len(cell) <= 300 else cell[:297] + "...") for cell in cells]
            if not is_of_items:
                shown.add_row(*texts)
                continue
            shown.add_section()
            shown.add_row(*texts[:2])
            for heading, text in zip(table.headings[2:], texts[2:], strict=True):
                shown.add_row(Text(heading), text)
        console.print(shown)


def to_markdown(tables: Iterable[Table]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"

    parts = []
    for table in tables:
        rule = line(["---"] * len(table.headings))
        parts.append("\n".join([f"## {table.title}\n", line(table.headings), rule, *map(line, table.rows)]))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> None:
    config = parse_args(CompareConfig, "python -m eval compare", argv)
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
        print(f"p-values are those of each test by itself, not adjusted for there being {num_tests}")
