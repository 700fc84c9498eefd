"""Keep the examples of a skipped step, to find the row that broke it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora.data.example import IGNORE_INDEX, Example
from qlora.system.files import new_file


def keep_examples(folder: Path | None, step: int, window: Sequence[Example], is_main: bool) -> str:
    """Write a step's examples to FOLDER/step-N.jsonl; returns a sentence that says where.

    Args:
        folder: created if absent; None: nothing is written.
        step: counted from 1.
        is_main: whether this process writes; others only return the sentence.
    """
    if folder is None:
        return f"Its examples: {', '.join(example.origin for example in window)}"
    path = folder / f"step-{step:06d}.jsonl"
    rows = [
        {
            "where": example.origin,
            "input_ids": example.input_ids.tolist(),
            "targets": [None if t == IGNORE_INDEX else t for t in example.targets.tolist()],
        }
        for example in window
    ]
    try:
        if is_main:
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as file:
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        return f"Its examples ({', '.join(e.origin for e in window)}) could not be written ({error})"
    return f"Its examples are in {path}"
