"""Make tables and pictures of a fidelity study from its finished files.

Intervals are 95 %. Over seeds: Student's t on the mean, n - 1 degrees of freedom; for two cells, on the mean of
the differences per seed. For two bases, which do not depend on the seed: over held-out rows, as a ratio of sums
(with d the difference of a row's summed losses and n its target tokens, r = sum d / sum n has the standard error
sqrt(m / (m - 1) sum (d - r n)^2) / sum n over m rows; Cochran, Sampling Techniques, section 6.4). For exact match:
Wilson's, over problems and seeds together, as if each answer were a separate problem.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity import BASES, CELLS, REMEDY, STUDY, Cell
from qlora.system.errors import InputError
from qlora.system.files import new_file, read_json

LEVEL = 0.95
BASE_NAMES = {
    "bf16": "bf16",
    "nf4": "NF4",
    "nf4-nodq": "NF4, no double quantization",
    "fp4": "FP4",
    "nf4-calibrated": "NF4, calibrated",
}
PLOT_NAMES = {**BASE_NAMES, "nf4-nodq": "NF4, no\ndouble q.", "nf4-calibrated": "NF4,\ncalibr."}
TARGET_NAMES = {"qv": "q/v", "all": "all-linear"}
REFERENCE = Cell("bf16", "qv", 8)
# (title, cell, cell to compare with)
COMPARISONS = (
    ("NF4 − bf16, q/v", Cell("nf4", "qv", 8), REFERENCE),
    ("NF4 − bf16, all-linear", Cell("nf4", "all", 8), Cell("bf16", "all", 8)),
    ("NF4 calibrated − bf16, q/v", Cell("nf4-calibrated", "qv", 8), REFERENCE),
    ("NF4 calibrated − bf16, all-linear", Cell("nf4-calibrated", "all", 8), Cell("bf16", "all", 8)),
    ("NF4 calibrated − NF4, q/v", Cell("nf4-calibrated", "qv", 8), Cell("nf4", "qv", 8)),
    ("NF4 calibrated − NF4, all-linear", Cell("nf4-calibrated", "all", 8), Cell("nf4", "all", 8)),
    ("FP4 − bf16, q/v", Cell("fp4", "qv", 8), REFERENCE),
    ("FP4 − NF4, q/v", Cell("fp4", "qv", 8), Cell("nf4", "qv", 8)),
    ("NF4 without − with double quantization", Cell("nf4-nodq", "qv", 8), Cell("nf4", "qv", 8)),
    ("all-linear − q/v, bf16", Cell("bf16", "all", 8), REFERENCE),
    ("all-linear − q/v, NF4", Cell("nf4", "all", 8), Cell("nf4", "qv", 8)),
    ("all-linear, rank 8 − q/v, rank 64, NF4", Cell("nf4", "all", 8), Cell("nf4", "qv", 64)),
    ("rank 4 − 8, NF4", Cell("nf4", "qv", 4), Cell("nf4", "qv", 8)),
    ("rank 16 − 8, NF4", Cell("nf4", "qv", 16), Cell("nf4", "qv", 8)),
    ("rank 64 − 8, NF4", Cell("nf4", "qv", 64), Cell("nf4", "qv", 8)),
)


# ---- intervals --------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half width of its t-interval); None for a single value."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))


def row_interval(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Difference of two losses per target token over the same rows, and half width of its interval.

    Args:
        rows, others: (mean loss, target tokens) of each row.
    """
    from scipy import stats

    counts = [count for _, count in rows]
    gaps = [(loss - other) * count for (loss, count), (other, _) in zip(rows, others, strict=True)]
    ratio, m = sum(gaps) / sum(counts), len(gaps)
    if m < 2:
        return ratio, None
    spread = sum((gap - ratio * count) ** 2 for gap, count in zip(gaps, counts, strict=True))
    error = math.sqrt(m / (m - 1) * spread) / sum(counts)
    return ratio, float(stats.t.ppf((1 + LEVEL) / 2, m - 1) * error)


def mean_loss(rows: Sequence[Sequence[float]]) -> float:
    """Loss per target token from (mean loss, target tokens) per row."""
    return sum(loss * count for loss, count in rows) / sum(count for _, count in rows)


def show(value: float, half: float | None, sign: bool = False) -> str:
    """Format a value with its interval, to three decimals."""
    shown = f"{value:+.3f}" if sign else f"{value:.3f}"
    if half is None:
        return shown
    low, high = value - half, value + half
    return f"{shown} [{low:+.3f}, {high:+.3f}]" if sign else f"{shown} ± {half:.3f}"


def show_match(answers: Sequence[Sequence[bool]]) -> str:
    """Format the number of right answers with Wilson's interval."""
    from scipy import stats

    right, total = sum(map(sum, answers)), sum(map(len, answers))
    if total == 0:
        return "—"
    interval = stats.binomtest(right, total).proportion_ci(LEVEL, "wilson")
    return f"{right}/{total} [{interval.low:.0%}, {interval.high:.0%}]"


# ---- the results ------------------------------------------------------------------------------------------


def read_study(directory: Path) -> dict[str, Any]:
    """Settings and the results of every finished part, by name.

    Raises:
        InputError: no part is finished, or a file is not a result.
    """
    if not (directory / STUDY).is_file():
        raise InputError(f"{directory} holds no study; pass --output-dir of one, or leave out --report-only.")
    study: dict[str, Any] = {"settings": read_json(directory / STUDY, "run the study again in a new directory")}
    for path in sorted(directory.glob("*.json")):
        name, part = path.stem, read_json(path, REMEDY) if path.name != STUDY else {}
        kind = "answers" if name.startswith("answers-") else "bases" if name.startswith("base-") else "cells"
        wanted = {"answers": "correct", "bases": "row_losses", "cells": "eval_loss"}[kind]
        if path.name != STUDY:
            if wanted not in part or "seconds" not in part:
                raise InputError(f"{path} is not a result of this command; {REMEDY}.")
            part.pop("answers", None)  # large texts, not needed here
            study.setdefault(kind, {})[name.removeprefix("answers-").removeprefix("base-")] = part
    if not study.get("cells"):
        raise InputError(f"No part of the study in {directory} is finished; leave out --report-only.")
    return {"bases": {}, "answers": {}, **study}


def losses_of(study: dict[str, Any], cell: Cell) -> dict[int, float]:
    """Seed -> held-out loss after training."""
    parts = (part for part in study["cells"].values() if part["cell"] == cell.name)
    return {part["seed"]: part["eval_loss"] for part in parts}


def answers_of(study: dict[str, Any], cell: Cell) -> list[list[bool]]:
    return [p["correct"] for n, p in study["answers"].items() if n.rpartition("-seed")[0] == cell.name]


def differences(study: dict[str, Any], cell: Cell, other: Cell) -> list[float]:
    """Held-out loss of a cell minus that of the other, for each seed that both have."""
    ours, theirs = losses_of(study, cell), losses_of(study, other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


# ---- tables -----------------------------------------------------------------------------------------------


def make_tables(study: dict[str, Any]) -> str:
    """The whole study in Markdown."""
    return "\n\n".join([describe(study), base_table(study), cell_table(study), comparison_table(study)])


def describe(study: dict[str, Any]) -> str:
    """A paragraph on settings and time."""
    s = study["settings"]
    parts = [part for kind in ("bases", "cells", "answers") for part in study[kind].values()]
    seconds, processor = (sum(part[key] for part in parts) for key in ("seconds", "cpu_seconds"))
    tokens = sum(part["tokens"] for part in study["cells"].values()) / len(study["cells"])
    return (
        f"{s['model']}; {s['steps']} steps of {s['batch_size']} rows of {s['data']} ({s['rows']:,} rows of at "
        f"most {s['max_length']} tokens), {tokens:,.0f} tokens in all on average; peak learning rate "
        f"{s['learning_rate']:g}, alpha {s['alpha']:g}, computed in {s['compute_dtype']}. Held-out loss on "
        f"{s['eval_rows']} rows of {s['eval_data']}, exact match ({s['match']}) on {s['problems']} problems of "
        f"it. {len(study['cells'])} trainings are finished. All parts took {processor / 60:.0f} minutes of "
        f"processor time, {seconds / 60:.0f} minutes by the clock if one came after the other."
    )


def make_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def base_table(study: dict[str, Any]) -> str:
    """Effect of quantization alone, before training."""
    rows, bases = [], study["bases"]
    for name in (name for name in BASES if name in bases):
        losses = bases[name]["row_losses"]
        gaps = [
            show(*row_interval(losses, bases[other]["row_losses"]), sign=True)
            if other in bases and name not in ("bf16", other)
            else "—"
            for other in ("bf16", "nf4")
        ]
        answers = [study["answers"][name]["correct"]] if name in study["answers"] else []
        error = f"{bases[name]['weight_error']:.2%}"
        rows.append([BASE_NAMES[name], error, f"{mean_loss(losses):.3f}", *gaps, show_match(answers)])
    headings = ["base, untrained", "weight error", "held-out loss", "− bf16, over rows", "− NF4, over rows"]
    return make_table([*headings, "exact match"], rows)


def cell_table(study: dict[str, Any]) -> str:
    rows = []
    for cell in CELLS:
        losses = losses_of(study, cell)
        if not losses:
            continue
        gaps = [] if cell == REFERENCE else differences(study, cell, REFERENCE)
        trainable = next(p["trainable"] for p in study["cells"].values() if p["cell"] == cell.name)
        rows.append(
            [
                BASE_NAMES[cell.base], TARGET_NAMES[cell.targets], str(cell.rank), f"{trainable:,}",
                str(len(losses)), show(*mean_interval(list(losses.values()))),
                show(*mean_interval(gaps), sign=True) if gaps else "—", show_match(answers_of(study, cell)),
            ]
        )  # fmt: skip
    headings = ["base", "layers", "rank", "trained", "seeds", "held-out loss", "− LoRA on bf16, q/v"]
    return make_table([*headings, "exact match"], rows)


def comparison_table(study: dict[str, Any]) -> str:
    rows = []
    for question, cell, other in COMPARISONS:
        gaps = differences(study, cell, other)
        if not gaps:
            continue
        gap, half = mean_interval(gaps)
        found = "one seed" if half is None else "no difference found"
        if half is not None and abs(gap) > half:
            found = "lower" if gap < 0 else "higher"
        rows.append([question, str(len(gaps)), show(gap, half, sign=True), found])
    return make_table(["held-out loss of", "seeds", "difference, paired", "95 % interval says"], rows)


# ---- pictures ---------------------------------------------------------------------------------------------


def draw(study: dict[str, Any], path: Path) -> None:
    """Plot held-out loss by data type, layers and rank: mean, interval, and each seed as a gray line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [Cell(base, targets, 8) for base in ("bf16", "nf4", "nf4-calibrated") for targets in TARGET_NAMES]
    panels = (
        ("data type (q/v, rank 8)", {PLOT_NAMES[base]: Cell(base, "qv", 8) for base in BASES}),
        ("layers (rank 8)", {f"{PLOT_NAMES[c.base]}\n{TARGET_NAMES[c.targets]}": c for c in layers}),
        ("rank (NF4, q/v)", {str(rank): Cell("nf4", "qv", rank) for rank in (4, 8, 16, 64)}),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, (title, cells) in zip(axes, panels, strict=True):
        found = [losses_of(study, cell) for cell in cells.values()]
        for seed in sorted({seed for losses in found for seed in losses}):
            heights = [losses.get(seed, math.nan) for losses in found]
            axis.plot(range(len(cells)), heights, ".-", color="0.75", linewidth=1, markersize=4)
        for x, (cell, losses) in enumerate(zip(cells.values(), found, strict=True)):
            if cell.base in study["bases"]:
                before = mean_loss(study["bases"][cell.base]["row_losses"])
                axis.plot(x, before, "o", color="C1", markerfacecolor="none")
            if losses:
                mean, half = mean_interval(list(losses.values()))
                axis.errorbar(x, mean, half, fmt="o", color="C0", capsize=5)
        axis.set_xticks(range(len(cells)), list(cells), fontsize=8)
        axis.set(xlabel=title, xlim=(-0.5, len(cells) - 0.5))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("held-out loss, nats per target token")
    legend = "Blue: after training, mean and 95 % interval over seeds (a gray line is a seed). "
    figure.suptitle(legend + "Orange: the untrained base", fontsize=10)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


# ---- writing ----------------------------------------------------------------------------------------------


def marks(name: str) -> tuple[str, str]:
    """The lines of a page that enclose a study's tables."""
    return f"<!-- {name}: written by benchmarks/fidelity.py -->", f"<!-- end of {name} -->"


def fill_page(text: str, name: str, tables: str) -> str:
    """The page with these tables between the study's marks.

    Raises:
        ValueError: the marks do not occur once each and in order.
    """
    begin, end = marks(name)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or end not in rest:
        raise ValueError(f"it lacks the lines {begin} and {end}")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def write_report(directory: Path, page: Path | None) -> None:
    """Write report.md and loss.png; with a page, also its tables, and results and picture next to it."""
    study, name = read_study(directory), directory.resolve().name
    tables = make_tables(study)
    write_text(directory / "report.md", tables + "\n")
    with new_file(directory / "loss.png") as staging:
        draw(study, staging)
    print(f"{tables}\n\nReport and picture saved to {directory}")
    if page is None:
        return
    try:
        filled = fill_page(page.read_text(encoding="utf-8"), name, tables)
    except (OSError, ValueError) as error:
        raise InputError(f"--page {page} cannot take the tables ({error}); create or correct it.") from error
    beside = page.with_name(f"{page.stem}-{name}")
    write_text(beside.with_suffix(".json"), json.dumps(study, indent=1) + "\n")
    with new_file(beside.with_suffix(".png")) as staging:
        draw(study, staging)
    write_text(page, filled)
    print(f"Tables saved to {page}, results and picture to {beside}.json and .png")


def write_text(path: Path, text: str) -> None:
    with new_file(path) as staging:
        staging.write_text(text, encoding="utf-8")
