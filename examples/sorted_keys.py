"""A task of preferences that can be checked: JSON with its keys in alphabetical order, rather than in another one.

    "Write this as JSON: size small, color red, item mug"
    chosen      {"color": "red", "item": "mug", "size": "small"}
    rejected    {"item": "mug", "color": "red", "size": "small"}

Both answers are right, equally long and differ in their order alone. Things come from a seeded generator; those
that are held out never occur in training.

    python -m examples.sorted_keys DIRECTORY [--seed N]

writes sft.jsonl (answers in any order), pairs.jsonl (dpo, ipo, orpo, simpo), labels.jsonl (kto), and of held-out
things test_pairs.jsonl, test_labels.jsonl and test.jsonl (the sorted answers, for exact match).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

VALUES = {
    "age": "new old used antique".split(),
    "city": "Oslo Paris Rome Vienna Lisbon Athens Boston Tokyo".split(),
    "color": "red blue green black white yellow brown gray".split(),
    "item": "mug lamp chair plate towel basket candle pillow clock vase".split(),
    "material": "wood steel glass cotton paper stone".split(),
    "size": "tiny small medium large huge".split(),
    "weight": "light medium heavy".split(),
}


def make_thing(rng: random.Random) -> tuple[str, dict[str, str], dict[str, str]]:
    """(prompt, its answer with sorted keys, the same in another order)."""
    keys = rng.sample(sorted(VALUES), rng.choice((3, 4)))
    thing = {key: rng.choice(VALUES[key]) for key in keys}
    right = sorted(keys)
    other = right
    while other == right:
        other = rng.sample(keys, len(keys))
    prompt = "Write this as JSON: " + ", ".join(f"{key} {value}" for key, value in thing.items())
    return prompt, {key: thing[key] for key in right}, {key: thing[key] for key in other}


def write_task(directory: Path, num_train: int = 600, num_test: int = 100, seed: int = 0) -> None:
    """Write the files of the module docstring."""
    rng = random.Random(seed)
    things: dict[str, tuple[str, str]] = {}
    while len(things) < num_train + num_test:
        prompt, right, other = make_thing(rng)
        things.setdefault(prompt, (json.dumps(right), json.dumps(other)))
    rows = list(things.items())
    train, test = rows[num_test:], rows[:num_test]
    files: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": p, "completion": rng.choice(both)} for p, both in train],
        "test": [{"prompt": p, "completion": right} for p, (right, _) in test],
    }
    for name, part in (("", train), ("test_", test)):
        pairs = [{"prompt": p, "chosen": right, "rejected": other} for p, (right, other) in part]
        labels = [bool(rng.getrandbits(1)) for _ in pairs]
        files[f"{name}pairs"] = pairs
        files[f"{name}labels"] = [
            {"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label}
            for row, label in zip(pairs, labels, strict=True)
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
