"""Golden values of the learning rate."""

from __future__ import annotations

import math

import pytest

from qlora.training.schedule import build_schedule, choose_warmup


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {3: 1.0, 8: 1.0, 12: 1.0, 13: 1.0, 50: 1.0}),
        ("linear", {3: 1.0, 4: 0.9, 8: 0.5, 12: 0.1, 13: 0.0, 50: 0.0}),
        ("cosine", {3: 1.0, 8: 0.5, 12: 0.5 * (1 - math.cos(math.pi / 10)), 13: 0.0, 50: 0.0}),
    ],
)
def test_schedule_golden_values(name: str, expected: dict[int, float]) -> None:
    """3 warm-up steps at 1/4, 1/2 and 3/4, then 10 more from the peak; zero just after the last."""
    schedule = build_schedule(name, peak=2e-4, warmup_steps=3, total_steps=13)
    for step, share in {0: 0.25, 1: 0.5, 2: 0.75, **expected}.items():
        assert schedule(step) == pytest.approx(2e-4 * share, abs=1e-12), step
    rates = [schedule(step) for step in range(13)]
    assert max(rates) == 2e-4 and min(rates) > 0
    assert rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True)


def test_schedule_without_room() -> None:
    """No warm-up starts at the peak; a warm-up as long as the run never falls."""
    assert build_schedule("cosine", 1.0, 0, 4)(0) == 1.0
    assert build_schedule("cosine", 1.0, 0, 1)(0) == 1.0
    short = build_schedule("linear", 1.0, 10, 4)
    assert [short(step) for step in range(4)] == pytest.approx([1 / 11, 2 / 11, 3 / 11, 4 / 11])


@pytest.mark.parametrize(
    ("asked", "kept", "total_steps", "expected"),
    [
        (None, None, 1000, 10),
        (None, None, 100, 10),
        (None, None, 99, 9),
        (None, None, 9, 0),
        (30, None, 20, 30),
        (0, 10, 1000, 0),
        (None, 2, 1000, 2),
        (None, 10, 5, 10),
    ],
)
def test_the_default_warm_up(asked: int | None, kept: int | None, total_steps: int, expected: int) -> None:
    """At most a tenth of the steps; what was asked and what a resumed run began with stay."""
    assert choose_warmup(asked, kept, total_steps) == expected
