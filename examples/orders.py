"""The demo task: turn a plain-English shop order into JSON.

    "Could you send 3 red mugs and 1 blue lamp to Anna in Oslo by Friday?"
    {"name": "Anna", "city": "Oslo", "day": "Friday", "items": [{"count": 3, "color": "red", "item": "mug"}, ...]}

Orders come from a seeded generator, so every answer is known and can be checked; held-out orders never occur in
training. A small base model answers with prose, or with JSON of another shape.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

NAMES = "Anna Ben Carla David Emma Farid Grace Hugo Ines Jonas Kira Liam Maya Noah Olga Paul Rosa Sam Tara".split()
CITIES = (
    "Oslo Paris Berlin Madrid Rome Vienna Lisbon Dublin Prague Warsaw Athens Helsinki Zurich Boston Tokyo".split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLORS = "red blue green black white yellow brown gray".split()
ITEMS = "mug lamp chair plate towel basket candle pillow clock vase".split()
WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
FRAMES = (
    "Please send {items} to {name} in {city} by {day}.",
    "Could you ship {items} to {city} for {name}? {day} would be great.",
    "{name} from {city} wants {items}, delivered on {day}.",
    "I need {items} in {city} on {day}. The name is {name}.",
    "Hi, this is {name}. {items} to {city} by {day}, please.",
    "An order for {day}: {items}, for {name} in {city}.",
)


def make_order(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(text, its meaning)."""
    name, city, day = rng.choice(NAMES), rng.choice(CITIES), rng.choice(DAYS)
    items: list[dict[str, Any]] = [
        {"count": rng.randint(1, 6), "color": rng.choice(COLORS), "item": item}
        for item in rng.sample(ITEMS, rng.choice((1, 2)))
    ]
    phrases = []
    for entry in items:
        count = entry["count"]
        spoken = WORDS[count] if rng.random() < 0.5 else str(count)
        phrases.append(f"{spoken} {entry['color']} {entry['item']}{'s' if count > 1 else ''}")
    listed = " and ".join(phrases)
    frame = rng.choice(FRAMES)
    if frame.startswith("Hi"):
        listed = listed.capitalize()
    return (
        frame.format(items=listed, name=name, city=city, day=day),
        {"name": name, "city": city, "day": day, "items": items},
    )


def make_orders(count: int, seed: int) -> list[dict[str, str]]:
    """`count` different orders as {"prompt", "completion"} records."""
    rng = random.Random(seed)
    orders: dict[str, str] = {}
    while len(orders) < count:
        text, meaning = make_order(rng)
        orders.setdefault(f"Write this order as JSON: {text}", json.dumps(meaning))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in orders.items()]


def write_task(directory: Path, num_train: int = 1200, num_test: int = 100, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl without common orders; returns their paths."""
    orders = make_orders(num_train + num_test, seed)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "test.jsonl"
    for path, part in zip(paths, (orders[num_test:], orders[:num_test]), strict=True):
        path.write_text("".join(json.dumps(order) + "\n" for order in part))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo task's training and test files.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--num-train", type=int, default=1200)
    parser.add_argument("--num-test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for written in write_task(arguments.directory, arguments.num_train, arguments.num_test, arguments.seed):
        print(written)
