"""A task of preferences that can be checked: JSON with its keys in alphabetical order, rather than in another one.

    "size small, color red, item mug"
    chosen      {"color": "red", "item": "mug", "size": "small"}
    rejected    {"item": "mug", "color": "red", "size": "small"}

Both answers are right and equally long. SFT learns answers in random order, so that it teaches the content and no
preference: one answer in six is sorted by chance. The pairs then teach the order. Things come from a seeded
generator; those that are held out never occur in training, in any order.

    python -m examples.sorted_keys DIRECTORY [--seed N]

writes sft.jsonl, pairs.jsonl (dpo, ipo, orpo, simpo), labels.jsonl (kto), and of held-out things test_pairs.jsonl,
test_labels.jsonl and test.jsonl (the sorted answers, for exact match).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

SYSTEM = "Write JSON."
VALUES = {
    "age": "new old used antique".split(),
    "city": "Oslo Paris Rome Vienna Lisbon Athens Boston Tokyo".split(),
    "color": "red blue green black white yellow brown gray".split(),
    "item": "mug lamp chair plate towel basket candle pillow clock vase".split(),
    "material": "wood steel glass cotton paper stone".split(),
    "size": "tiny small medium large huge".split(),
    "weight": "light medium heavy".split(),
}


def make_thing(rng: random.Random) -> dict[str, str]:
    """Three keys in random order, and their values."""
    return {key: rng.choice(VALUES[key]) for key in rng.sample(sorted(VALUES), 3)}


def in_order(thing: dict[str, str], keys: list[str]) -> str:
    return json.dumps({key: thing[key] for key in keys})


def write_task(directory: Path, num_train: int = 320, num_test: int = 100, seed: int = 0) -> None:
    """Write the files of the module docstring; pairs and labels are of the first 160 training things."""
    rng = random.Random(seed)
    things: dict[frozenset[tuple[str, str]], dict[str, str]] = {}
    while len(things) < num_train + num_test:
        thing = make_thing(rng)
        things.setdefault(frozenset(thing.items()), thing)
    rows: list[tuple[dict[str, str], dict[str, str]]] = []  # (what is asked, its answers)
    for thing in things.values():
        right = other = sorted(thing)
        while other == right:
            other = rng.sample(right, 3)
        orders = {"any": rng.sample(right, 3), "chosen": right, "rejected": other}
        prompt = ", ".join(f"{key} {value}" for key, value in thing.items())
        answers = {name: in_order(thing, keys) for name, keys in orders.items()}
        rows.append(({"system": SYSTEM, "prompt": prompt}, answers))
    train, test = rows[num_test:], rows[:num_test]
    files: dict[str, list[dict[str, Any]]] = {
        "sft": [asked | {"completion": answers["any"]} for asked, answers in train],
        "test": [asked | {"completion": answers["chosen"]} for asked, answers in test],
    }
    for name, part in (("", train[:160]), ("test_", test)):
        sides = ("chosen", "rejected")
        files[f"{name}pairs"] = [asked | {side: answers[side] for side in sides} for asked, answers in part]
        files[f"{name}labels"] = [
            asked | {"completion": answers[side], "label": side == "chosen"}
            for asked, answers in part
            for side in (rng.choice(sides),)
        ]
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the files of a task of preferences.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_task(options.directory, seed=options.seed)
