"""Results of an evaluation: a printed table, and a JSON file for comparing models item by item."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qlora.system.errors import InputError
from qlora.system.versions import versions

from .scores import Score

SCORE_KEYS = {item.name for item in fields(Score)}
PACKAGES = ("python", "qlora", "torch", "transformers", "bitsandbytes", "accelerate", "scipy")


def check_output(output: str | None, flag: str = "output") -> None:
    """InputError if --output cannot be written, before hours of computing."""
    if output is not None and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise InputError(f"--{flag} {output} cannot be written; name a file in a directory that exists.")


def write_result(
    output: str | None,
    task: str,
    scores: Sequence[Score],
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    pairing: Mapping[str, Sequence[str]],
    **more: Any,
) -> dict[str, Any]:
    """The result as one JSON object, also written to `output` if given.

    Args:
        task: the command, such as "perplexity".
        settings: every flag.
        rows: one object per item, in order, each with an "id" that identifies the item.
        pairing: score name -> (key,) or (key, key of the weight) in `rows`, for the paired test of two results.
        more: further entries at the top level.
    """
    from qlora.system.files import new_file
    from qlora.system.redact import redact

    result = {
        "task": task,
        "num_samples": len(rows),
        **more,
        "scores": [{name: _finite(value) for name, value in asdict(score).items()} for score in scores],
        "settings": json.loads(redact(json.dumps(settings))),
        "versions": versions(*PACKAGES),
        "pairing": {name: list(keys) for name, keys in pairing.items()},
        "rows": list(rows),
    }
    if output is not None:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        with new_file(Path(output)) as file:
            file.write_text(text + "\n", encoding="utf-8")
    return result


def _finite(value: Any) -> Any:
    """Replace infinities, which JSON lacks, by null: a broken model's perplexity may be infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(path: str) -> dict[str, Any]:
    """Read a file written by `write_result`.

    Raises:
        InputError: the file does not exist or is not a result.
    """
    from qlora.system.files import read_json

    result = read_json(Path(path), "give a file written by --output of an evaluation")
    rows, pairing, scores = result.get("rows"), result.get("pairing"), result.get("scores")
    if (
        not isinstance(rows, list)
        or not isinstance(pairing, dict)
        or not isinstance(scores, list)
        or not all(isinstance(keys, list) and keys for keys in pairing.values())
        or not all(isinstance(score, dict) and score.keys() >= SCORE_KEYS for score in scores)
    ):
        raise InputError(f"{path} is not the result of an evaluation; give a file written by --output.")
    return result


def format_score(value: float | None, is_share: bool) -> str:
    """Format a value for a table: shares in percent, others with four digits."""
    if value is None:
        return "—"
    return f"{value:.1%}" if is_share else f"{value:.4g}"


def print_scores(title: str, scores: Sequence[Score]) -> None:
    """Print a table of scores, their intervals and numbers of items."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    methods = ", ".join(dict.fromkeys(score.method for score in scores))
    table.caption, table.caption_justify = f"intervals: {methods}", "left"
    percent = f"{scores[0].confidence * 100:g}" if scores else "95"
    for heading in ("score", "value", f"{percent} % interval", "items"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for score in scores:
        is_share = score.method in ("Wilson", "bootstrap in subjects")
        ends = [format_score(end, is_share) for end in (score.low, score.high)]
        interval = " to ".join(ends) if score.low is not None else "—"
        table.add_row(score.name, format_score(score.value, is_share), interval, f"{score.num_samples:,}")
    Console().print(table)
