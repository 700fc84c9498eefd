"""Curves of a run: smoothed and thinned against slow versions, and drawn where they belong."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from qlora.report.charts import ROLES, Curve, draw_curves, draw_histogram, smooth, thin


@pytest.mark.parametrize("count", [1, 2, 19, 20, 137, 4000])
def test_smoothing_is_the_mean_of_the_last_values(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count).tolist()
    smoothed, width = smooth(values)
    assert width == 1 + count // 20
    expected = [sum(values[max(0, end - width) : end]) / min(end, width) for end in range(1, count + 1)]
    np.testing.assert_allclose(smoothed, expected, atol=1e-12)


def test_a_thinned_curve_keeps_its_ends_and_its_extremes() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[[12_345, 99_998]] = 50, -50
    steps, kept = thin(range(1, 100_001), values)
    assert 300 < len(steps) <= 600 and (np.diff(steps) > 0).all()
    assert steps[0] == 1 and steps[-1] == 100_000 and {12_346, 99_999} <= set(steps.tolist())
    np.testing.assert_array_equal(kept, values[steps - 1])
    few = thin([1, 2], [3.0, 4.0])
    assert few[0].tolist() == [1, 2] and few[1].tolist() == [3.0, 4.0]


def points(svg: str, role: str) -> np.ndarray:
    """(N, 2) coordinates of the line in a role's colour."""
    paths = [p for p in ElementTree.fromstring(svg).iter("path") if f"stroke: var(--{role})" in p.get("style", "")]
    return np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", paths[0].attrib["d"]), dtype=float)


def test_a_curve_is_drawn_where_its_numbers_say() -> None:
    """The corners of the path are an affine image of (step, value), for both curves the same."""
    steps, each, held_out = [1, 2, 5, 9], [2.0, 1.0, 1.5, 0.5], [1.75, 0.25]
    svg = draw_curves("a", "label", [Curve(steps, each, "each"), Curve([2, 9], held_out, "held-out")])
    drawn = np.concatenate([points(svg, "each"), points(svg, "held-out")])
    assert len(drawn) == 6
    numbers = np.array([*zip(steps, each, strict=True), (2, 1.75), (9, 0.25)])
    for axis, sign in ((0, 1), (1, -1)):  # y goes down in a picture
        scale, offset = np.polyfit(numbers[:, axis], drawn[:, axis], 1)
        assert scale * sign > 0
        np.testing.assert_allclose(drawn[:, axis], scale * numbers[:, axis] + offset, atol=1e-3)


def test_bars_are_as_high_as_their_counts() -> None:
    svg = draw_histogram("h", "label", [0, 10, 20, 40], [1, 4, 2])
    paths = ElementTree.fromstring(svg).iter("path")
    shape = next(path for path in paths if "fill: var(--smooth)" in path.get("style", ""))
    corners = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", shape.attrib["d"]), dtype=float)
    heights = corners[:, 1].max() - np.unique(corners[:, 1])
    np.testing.assert_allclose(sorted(heights / heights.max() * 4), [0, 1, 2, 4], atol=1e-3)


def test_charts_on_one_page_do_not_clash() -> None:
    """No name twice, nothing from elsewhere, no style for the whole page, no colour but the page's."""
    label = 'a "label" & <b>'
    curves = [Curve([1, 2], [1.0, 2.0], "held-out"), Curve([1, 2], [1.5, 1.5], "limit")]
    one, other = (draw_curves(name, label, curves) for name in ("one", "other"))
    names = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, other)]
    assert names[0] and names[1] and not names[0] & names[1]
    for svg, known in zip((one, other), names, strict=True):
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == label and root.get("role") == "img"
        assert "width" not in root.attrib and root.get("viewBox")
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) == known
        assert "http" not in svg and "<style" not in svg and "font-family" not in svg
        used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert used - {"none"} == {f"var(--{role})" for role in ("muted", "grid", "held-out")} and "each" in ROLES
