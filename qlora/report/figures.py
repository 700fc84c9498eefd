"""The charts of the run report."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qlora.report.answers import MOST_ROWS, WIDE, choose_evenly, words
from qlora.report.charts import Curve, Numbers, draw_curves, draw_histogram, smooth
from qlora.report.run import Run, is_number


@dataclass
class Table:
    """The numbers of a chart; evenly spaced rows if there are many."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Chart:
    """One figure of the page.

    Attributes:
        label: its main numbers in words, for readers who cannot see it.
        svgs: one drawing, or a wide and a narrow one.
        key: (style, words) of each curve, if there are several.
    """

    title: str
    label: str
    svgs: list[str]
    tables: list[Table]
    key: list[tuple[str, str]] = field(default_factory=list)


def draw_charts(run: Run) -> list[Chart]:
    """Draw every chart that has more than one point."""
    charts = [
        draw_loss(run),
        *(_draw_score(run, name) for name in run.scores),
        _draw_column(run, "accuracy", "Share of preferences that the model has, training", is_noisy=True),
        _draw_column(run, "margin", "Margin between rewards, training", is_noisy=True),
        _draw_column(run, "learning_rate", "Learning rate"),
        _draw_column(run, "grad_norm", "Gradient norm, before clipping", is_noisy=True),
        _draw_column(run, "tokens_per_second", "Tokens per second", is_noisy=True),
        _draw_lengths(run),
    ]
    return [chart for chart in charts if chart is not None]


def draw_loss(run: Run) -> Chart | None:
    """Draw training loss, each step and smoothed, and held-out loss."""
    steps, losses = run.column("loss")
    eval_steps, eval_losses = run.held_out()
    if max(len(losses), len(eval_losses)) < 2:
        return None
    curves, key, tables, said = [], [], [], []
    if len(losses):
        smoothed, width = smooth(losses)
        style = "each" if width > 1 else "smooth"
        curves.append(Curve(steps, losses, style))
        key.append((style, "training, each step"))
        if width > 1:
            curves.append(Curve(steps, smoothed, "smooth"))
            key.append(("smooth", f"training, mean of {width:,} steps"))
        said.append(f"training {losses[0]:.3f} at step {steps[0]:,}, {smoothed[-1]:.3f} at step {steps[-1]:,}")
        tables.append(_table("Training", ("step", "loss", f"mean of {width:,}"), steps, losses, smoothed))
    if len(eval_losses):
        curves.append(Curve(eval_steps, eval_losses, "held-out"))
        key.append(("held-out", "held out"))
        said.append(f"held out {_describe(eval_steps, eval_losses)}")
        tables.append(_table("Held out", ("step", "loss"), eval_steps, eval_losses))
    label = f"Loss by optimizer step: {'; '.join(said)}"
    svgs = [draw_curves("loss-wide", label, curves, WIDE, None), draw_curves("loss", label, curves, bottom=None)]
    is_pairs = (run.setting("train", "objective") or "sft") != "sft"
    title = "Loss per row of preferences" if is_pairs else "Loss per target token, in nats"
    return Chart(title, label, svgs, tables, key)


def _draw_score(run: Run, name: str) -> Chart | None:
    steps, scores = run.held_out(name)
    if len(scores) < 2:
        return None
    title = f"{words(name).capitalize()}, held out"
    label = f"{title}: {_describe(steps, scores)}"
    top = 1.02 if 0 <= scores.min() <= scores.max() <= 1 else None
    svg = draw_curves(f"score-{name}", label, [Curve(steps, scores, "held-out")], top=top)
    return Chart(title, label, [svg], [_table("", ("step", words(name)), steps, scores)])


def _draw_column(run: Run, name: str, title: str, is_noisy: bool = False) -> Chart | None:
    """Draw one number of the training lines; a noisy one also smoothed."""
    steps, values = run.column(name)
    if len(values) < 2:
        return None
    curves, key = [Curve(steps, values, "smooth")], [("smooth", "each step")]
    smoothed, width = smooth(values)
    if is_noisy and width > 1:
        curves = [Curve(steps, values, "each"), Curve(steps, smoothed, "smooth")]
        key = [("each", "each step"), ("smooth", f"mean of {width:,}")]
    limit = run.setting("train", "max_grad_norm")
    if name == "grad_norm" and is_number(limit) and 0 < limit < 3 * values.max():
        curves.append(Curve([steps[0], steps[-1]], [limit, limit], "limit"))
        key.append(("limit", f"clipped to {limit:g}"))
    label = f"{title} by optimizer step: {_describe(steps, values)}, median {np.median(values):.4g}"
    table = _table("", ("step", words(name)), steps, values)
    return Chart(title, label, [draw_curves(name, label, curves)], [table], key if len(key) > 1 else [])


def _draw_lengths(run: Run) -> Chart | None:
    """Draw the lengths of the training examples."""
    examples = run.facts.get("examples")
    lengths = examples.get("lengths") if isinstance(examples, dict) else None
    edges, counts = (lengths.get(k) if isinstance(lengths, dict) else None for k in ("edges", "counts"))
    if not (isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 > 1):
        return None
    if not all(map(is_number, edges + counts)) or sum(counts) <= 0 or edges != sorted(set(edges)):
        return None
    top = counts.index(max(counts))
    label = (
        f"Length of {sum(counts):,.0f} examples in tokens: {edges[0]:,.0f} to {edges[-1]:,.0f}, most "
        f"({counts[top]:,.0f}) between {edges[top]:,.0f} and {edges[top + 1]:,.0f}"
    )
    table = _table("", ("from", "up to", "examples"), edges[:-1], edges[1:], counts)
    return Chart("Example length in tokens", label, [draw_histogram("lengths", label, edges, counts)], [table])


def _describe(steps: np.ndarray, values: np.ndarray) -> str:
    """Describe first, last, lowest and highest value."""
    low, high = values.argmin(), values.argmax()
    return (
        f"{values[0]:.4g} at step {steps[0]:,}, {values[-1]:.4g} at step {steps[-1]:,}, lowest {values[low]:.4g} "
        f"(step {steps[low]:,}), highest {values[high]:.4g} (step {steps[high]:,})"
    )


def _table(caption: str, columns: tuple[str, ...], *values: Numbers) -> Table:
    """A table of `values`, one sequence per column."""
    number = len(values[0])
    places = choose_evenly(range(number), MOST_ROWS)
    left_out = f"{len(places):,} of {number:,} rows; metrics.jsonl has all" if len(places) < number else ""
    rows = [tuple(_cell(column[place]) for column in values) for place in places]
    return Table(", ".join(filter(None, (caption, left_out))), columns, rows)


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:.6g}"
