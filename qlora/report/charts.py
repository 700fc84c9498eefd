"""Charts as inline SVG: text stays text, colors come from the page, and a long run stays small.

Matplotlib draws each role in a color that it does not use otherwise, which is then replaced by `var(--role)`, so
that the page's style sheet decides (dark mode, print). Anything that could clash with the page or another chart is
removed: styles, metadata, namespaces, group names, sizes other than the view box.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers: TypeAlias = "Sequence[float] | np.ndarray"
MOST_POINTS = 600  # per curve: about two for each pixel of a phone
MOST_MARKERS = 40  # per curve
ROLES = ("muted", "grid", "each", "smooth", "held-out")
COLOR = {role: f"#0000{number:02x}" for number, role in enumerate(ROLES, 1)}
STYLES: dict[str, dict[str, Any]] = {
    "each": {"color": COLOR["each"], "linewidth": 1},
    "smooth": {"color": COLOR["smooth"], "linewidth": 1.8},
    "held-out": {"color": COLOR["held-out"], "linewidth": 1.6, "marker": "o", "markersize": 4},
    "limit": {"color": COLOR["muted"], "linewidth": 1.2, "linestyle": (0, (4, 3))},
}
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 8, 24  # margins, in the units of the view box


class Curve(NamedTuple):
    """Values over optimizer steps, in one of STYLES."""

    steps: Numbers
    values: Numbers
    style: str


def smooth(values: Numbers) -> tuple[np.ndarray, int]:
    """(mean of the last `width` values at each point, width); width is 1/20 of the values, less at the start."""
    width = 1 + len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts), width


def thin(steps: Numbers, values: Numbers, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: the lowest and highest of each interval, the first and the last."""
    steps, values = np.asarray(steps), np.asarray(values)
    if len(steps) <= most:
        return steps, values
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), most // 2 - 1):
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    places = sorted(kept)
    return steps[places], values[places]


def draw_curves(
    name: str,
    label: str,
    curves: Sequence[Curve],
    size: tuple[int, int] = (400, 210),
    bottom: float | None = 0,
    top: float | None = None,
) -> str:
    """Curves over steps, as an <svg> element.

    Args:
        name: unique among the charts on the page.
        label: text for readers who cannot see it.
        size: (width, height) of the view box.
        bottom, top: limits of the value axis; None = from the values.
    """
    figure, axes = _begin(size)
    for curve in curves:
        steps, values = thin(curve.steps, curve.values)
        marker = {"marker": ""} if len(steps) > MOST_MARKERS else {}
        axes.plot(steps, values, **STYLES[curve.style] | marker)
    axes.margins(x=0.02)
    axes.set_ylim(bottom, top)
    return _finish(figure, axes, name, label)


def draw_histogram(
    name: str, label: str, edges: Sequence[float], counts: Sequence[float], size: tuple[int, int] = (400, 210)
) -> str:
    """Counts between edges (one more than counts), as an <svg> element; other arguments as in `draw_curves`."""
    figure, axes = _begin(size)
    axes.stairs(counts, edges, fill=True, color=COLOR["smooth"])
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, name, label)


def _begin(size: tuple[int, int]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot, which has global state

    width, height = size
    figure = Figure(figsize=(width / 72, height / 72))  # SVG has 72 units to an inch
    axes = figure.add_axes(
        (LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / height)
    )
    return figure, axes


def _finish(figure: Figure, axes: Axes, name: str, label: str) -> str:
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_write_tick)
    axes.yaxis.set_major_formatter(_write_tick)
    axes.tick_params(length=0, labelcolor=COLOR["muted"], labelsize=11, pad=5)
    axes.grid(axis="y", color=COLOR["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOR["grid"])
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    drawn = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name}
    ):  # the salt makes names unique per chart
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(drawn.getvalue(), label)


def _write_tick(value: float, _: float) -> str:
    """Format a tick, as 20,000, 0.25 or 5e-5."""
    if 1e3 <= value < 1e7:
        return f"{value:,.0f}"
    return re.sub(r"\.?0*e-0*", "e-", f"{value:.2e}") if 0 < value < 1e-2 else f"{value:.4g}"


def _inline(svg: str, label: str) -> str:
    """Turn matplotlib's SVG file into an element for a page."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if element.tag == "g":
            attributes.pop("id", None)
        if "style" in attributes:
            style = re.sub(r"font-family:[^;]*;?", "", attributes["style"])
            for role, color in COLOR.items():
                style = style.replace(color, f"var(--{role})")
            attributes["style"] = style.strip(" ;")
        element.text = element.text and element.text.strip()
        element.tail = None
        element.attrib.clear()
        element.attrib.update({key: re.sub(r"\s+", " ", value) for key, value in attributes.items()})
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
