"""Compare two results of one evaluation item by item: paired tests, and the items won, lost and tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from qlora.system.errors import InputError

from .scores import Comparison, paired_test

OWN_SETTINGS = ("output", "markdown", "results", "show", "debug", "cache", "batch_size")  # do not affect scores
CONTENT = ("prompt", "expected", "words", "bytes")  # keys of a row that describe the item


@dataclass
class Pair:
    """Indices of two models, their tests, and the indices of the items that the second wins, loses and ties."""

    first: int
    second: int
    tests: list[Comparison]
    outcomes: dict[str, list[int]]


def align_rows(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each result's rows in the order of the first result.

    Items are identified by file name and position without the folder, since files may have moved.
    Raises:
        InputError: the results have different tasks or items.
    """
    tasks = [result.get("task") for result in results]
    if len(set(tasks)) > 1:
        listed = ", ".join(f"{name} is of {task}" for name, task in zip(names, tasks, strict=True))
        raise InputError(f"Only results of the same evaluation can be compared, but {listed}.")
    keyed = [_rows_by_item(name, result) for name, result in zip(names, results, strict=True)]
    for name, rows in zip(names[1:], keyed[1:], strict=True):
        for one, other, here, there in ((keyed[0], rows, names[0], name), (rows, keyed[0], name, names[0])):
            missing = [key for key in one if key not in other]
            if missing:
                raise InputError(
                    f"{len(missing)} of the {len(one)} items of {here} are not in {there} (the first is "
                    f"{missing[0]}); evaluate both on the same data."
                )
        for key, row in rows.items():
            for part in CONTENT:
                if keyed[0][key].get(part) != row.get(part):
                    raise InputError(
                        f"The {part} of {key} differs between {names[0]} and {name}; evaluate both on the same "
                        "data."
                    )
    return [[rows[key] for key in keyed[0]] for rows in keyed]


def _rows_by_item(name: str, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    keys = [key for entry in result["pairing"].values() for key in entry]
    for row in result["rows"]:
        origin = row.get("id") if isinstance(row, dict) else None
        if not isinstance(origin, str) or not all(isinstance(row.get(key), (bool, int, float)) for key in keys):
            raise InputError(f"{name} has a row without id or score; give a file written by --output.")
        item = origin.replace("\\", "/").rpartition("/")[2]
        if item in rows:
            raise InputError(f"{name} has the item {item} twice; give a file written by --output.")
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
    """Test two models on the same items, with every score that is comparable.

    Args:
        rows: aligned rows of all models.
        pairing: score name -> keys in the rows, as in a result; the first score decides who wins an item.
    Raises:
        InputError: no score is comparable, as with perplexities per token of different tokenizers.
    """
    a, b = rows[first], rows[second]
    tests = []
    for name, keys in pairing.items():
        weights = [[row[key] for row in side] for side in (a, b) for key in keys[1:]]
        if not weights or weights[0] == weights[1]:
            here, there = ([row[keys[0]] for row in side] for side in (a, b))
            tests.append(paired_test(name, here, there, weights[0] if weights else None, seed, confidence))
    if not tests:
        raise InputError("The models count different tokens, words and bytes, so no score can be compared.")
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
    """Compare each pair of results; also returns everything as a JSON object.

    Raises:
        InputError: the results have nothing in common.
    """
    rows = align_rows(names, results)
    shared = {
        score: keys
        for score, keys in results[0]["pairing"].items()
        if all(result["pairing"].get(score) == keys for result in results)
    }
    if not shared:
        raise InputError(f"{' and '.join(names)} have no score in common; evaluate both with the same flags.")
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
    """A model's answer to an item: with several samples the first, and how many are right; None without text."""
    samples = row.get("samples")
    if isinstance(samples, list) and samples:
        right = sum(isinstance(sample, dict) and bool(sample.get("correct")) for sample in samples)
        return f"{right} of {len(samples)} right, the first: {row.get('answer')}"
    return row.get("chosen", row.get("answer"))  # for a choice, "answer" is the index of the right one


def settings_that_differ(compared: Sequence[dict[str, Any]]) -> list[str]:
    """Name and values of each flag that differs between the results."""
    settings = [entry["settings"] for entry in compared]
    names = dict.fromkeys(name for each in settings for name in each if name not in OWN_SETTINGS)
    values = {name: [each.get(name) for each in settings] for name in names}
    return [f"{name}: {', '.join(map(str, v))}" for name, v in values.items() if any(x != v[0] for x in v)]
