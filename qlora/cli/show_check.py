"""Print what `check_data` found."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qlora.data.check import DataCheck, length_histogram
from qlora.data.keys import describe_notes
from qlora.system.wording import list_first

NUM_ROWS = 20  # bad rows to print
NUM_PLACES = 3  # suspicious rows of one kind to print
BAR_WIDTH = 40


def print_check(check: DataCheck, console: Console | None = None) -> None:
    """Print the summary."""
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    formats = ", ".join(f"{count:,} {name}" for name, count in check.formats.most_common())
    console.print(f"{check.source}: {check.num_rows:,} rows" + (f" ({formats})" if formats else ""))
    if check.lengths:
        longest, mean = max(check.lengths), sum(check.lengths) / len(check.lengths)
        console.print(f"{sum(check.lengths):,} {check.unit}, {mean:,.0f} a row, {longest:,} in the longest")
        _print_histogram(check, console)
    if check.report:
        masked = check.report.num_tokens - check.report.num_targets
        console.print(f"{check.report}; the other {masked:,} are masked: context only, no loss")
    for line in describe_notes(check.notes):
        console.print(line)
    if check.sample:
        console.print(f"\nthe first row as the model sees it, {check.sample}\n")
    if check.bad_rows:
        console.print(f"{len(check.bad_rows):,} rows cannot be used:")
        console.print("  " + list_first([str(row) for row in check.bad_rows], NUM_ROWS, "\n  "))
    if check.suspicious:
        console.print("usable rows worth checking:")
    for sign, places in sorted(check.suspicious.items(), key=lambda item: -len(item[1])):
        console.print(f"  {len(places):>6,}  {sign}: {list_first(places, NUM_PLACES, ', ')}")


def _print_histogram(check: DataCheck, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in (check.unit, "rows"):
        table.add_column(name, justify="right")
    table.add_column("")
    buckets = length_histogram(check.lengths)
    most = max(count for _, _, count in buckets)
    for low, high, count in buckets:
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        table.add_row(span, f"{count:,}", "#" * -(-BAR_WIDTH * count // most))
    console.print(table)
