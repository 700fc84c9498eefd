"""Runs to make pages of, and a page taken apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qlora.config.run import RunConfig

VOID = {"meta", "link", "br", "hr", "img", "input"}  # HTML's elements without an end
BYTES = {"base": 10**8, "adapters": 10**6, "gradients": 10**6, "optimizer": 4 * 10**6, "activations": 9 * 10**8}
FACTS: dict[str, Any] = {
    "command": "python train.py --model M --data 'my data.jsonl' --rank 4",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "started": "2026-11-24T07:00:00+00:00",
    "device": "2 cores of a CPU",
    "num_processes": 1,
    "parameters": {"trainable": 460_800, "total": 134_515_008},
    "memory_plan": BYTES,
    "examples": {
        "num_train": 96,
        "num_held_out": 5,
        "num_tokens": 12_345,
        "num_targets": 6_789,
        "lengths": {"edges": [0, 50, 100, 150], "counts": [10, 70, 16]},
    },
}


def train_line(step: int, **changed: Any) -> dict[str, Any]:
    line = {
        "step": step,
        "loss": 2.0 / step + 0.01 * (step % 3),
        "grad_norm": 0.5 + 1 / step,
        "learning_rate": 1e-3 / step,
        "num_tokens": 1000 + step,
        "target_tokens": 400,
        "tokens_per_second": 500.0 + step,
        "peak_memory_gib": 1.25 + 0.001 * step,
    }
    return line | changed


def write_run(
    directory: Path,
    metrics: Sequence[dict[str, Any]] | None = None,
    samples: Sequence[dict[str, Any]] | None = None,
    facts: dict[str, Any] | None = FACTS,
    **settings: dict[str, Any],
) -> Path:
    """The files of a run; of `settings` the given ones, by section, the others at their defaults."""
    directory.mkdir(parents=True, exist_ok=True)
    run = RunConfig().saved()
    for section, values in settings.items():
        run[section] |= values
    if facts is not None:
        run["facts"] = facts
    (directory / "run.json").write_text(json.dumps(run))
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        if lines is not None:
            (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_whole_run(directory: Path) -> Path:
    """24 steps with all there is: evaluations, a score, samples, a skipped step."""
    metrics = [train_line(step) for step in range(1, 25) if step != 7]
    metrics.insert(6, {"step": 7, "loss": None, "skipped": 1, "learning_rate": 1e-4})
    metrics += [
        {"step": s, "eval_loss": 2.1 - 0.05 * s + 0.0005 * s * s, "exact_match": s / 32} for s in (8, 16, 24)
    ]
    samples = [
        {"step": step, "prompt": "How many?\nSay it.", "completion": text, "expected": "three red mugs"}
        for step, text in (
            (0, "I do not know."),
            (8, "three blue mugs"),
            (16, "three red mugs"),
            (24, "three red mugs"),
        )
    ]
    train = {"max_steps": 24, "learning_rate": 0.002}
    return write_run(directory, metrics, samples, model={"model": "M"}, train=train)


class Page(HTMLParser):
    """A page, parsed strictly: every element is ended, in order.

    Attributes:
        tags: each element's name and attributes.
        text: what a reader sees, blanks as they stand.
        tables: (title of the figure or section around it, rows of cells) of each table.
        texts: text of each element that has a class, by class.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.title = "", ""
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, dict[str, str], int]] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        known = {key: value or "" for key, value in attributes}
        self.tags.append((tag, known))
        if tag == "table":
            self.tables.append((self.title, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        if tag not in VOID:
            self._open.append((tag, known, len(self.text)))

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, start = self._open.pop()
        assert opened == tag, f"</{tag}> ends <{opened}>"
        text = self.text[start:]
        if tag in ("figcaption", "h2"):
            self.title = text
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append(text)
        for name in attributes.get("class", "").split():
            self.texts.setdefault(name, []).append(text)
        if tag in ("td", "th", "dt", "dd", "li"):
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1][0] != "style":
            self.text += data

    def rows(self, title: str, number: int = 0) -> list[list[str]]:
        """Rows of the table of that number under a title, its header left out."""
        found = [rows for under, rows in self.tables if under.startswith(title)]
        return found[number][1:]
