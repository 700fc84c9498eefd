"""The tables of a comparison, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .pairs import Pair
from .results import format_score


@dataclass
class Table:
    """A table for the terminal and for Markdown."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def make_tables(
    names: Sequence[str], pairs: Sequence[Pair], found: dict[str, Any], show: int | None
) -> list[Table]:
    """Tables of scores, of tests, and per pair of the items won, lost and tied.

    Args:
        show: number of items of each kind; None = all.
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
    """Item, prompt, expected answer, and the two answers, or their scores if there are no texts."""
    said = [item["answers"][name] for name in (first, second)]
    if said == [None, None]:
        said = [format_score(float(item["values"][name]), False) for name in (first, second)]
    return [
        item["id"].rpartition("/")[2],
        *(str(cell) for cell in (item.get("prompt", ""), item.get("expected", ""), *said)),
    ]


def print_tables(tables: Iterable[Table]) -> None:
    from rich import table as rich_table
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for table in tables:
        is_of_items = table.headings[1] == "item"  # long texts: print them below each other
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
