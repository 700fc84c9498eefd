"""Intervals and paired tests, against formulas and enumeration; files of results."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from eval.results import check_output, print_scores, read_result, write_result
from eval.scores import mean_of_groups, mean_score, paired_test, proportion
from qlora.system.errors import InputError


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (7, 20), (1, 1)])
def test_wilson(hits: int, count: int) -> None:
    """The formula of Wilson (1927) with z = 1.96."""
    p, z = hits / count, 1.959963984540054
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    width = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    score = proportion("acc", [True] * hits + [False] * (count - hits))
    assert (score.value, score.num_samples) == (p, count)
    assert (score.low, score.high) == (
        pytest.approx(max(0, middle - width)),
        pytest.approx(min(1, middle + width)),
    )


def test_a_mean_s_interval_is_that_of_resampled_items() -> None:
    draw = np.random.default_rng(1)
    values, weights = draw.normal(50, 9, 60), draw.integers(5, 30, 60)
    score = mean_score("nats", values.tolist(), weights.tolist(), np.exp, seed=3, confidence=0.9)
    assert score.value == pytest.approx(math.exp(values.sum() / weights.sum()))
    again = np.random.default_rng(5).integers(0, 60, (20000, 60))
    ratios = np.exp(values[again].sum(axis=1) / weights[again].sum(axis=1))
    assert (score.low, score.high) == pytest.approx(np.quantile(ratios, [0.05, 0.95]), rel=0.05)
    assert score == mean_score("nats", values.tolist(), weights.tolist(), np.exp, seed=3, confidence=0.9)
    wider = mean_score("nats", values.tolist(), weights.tolist(), np.exp, seed=3, confidence=0.99)
    assert wider.low < score.low < score.high < wider.high  # type: ignore[operator]


def test_intervals_hold_what_they_promise() -> None:
    """Of 100 samples of 30 items, about 95 intervals hold the true mean; a bootstrap's are a bit short."""
    draw = np.random.default_rng(0)
    means, shares = 0, 0
    for seed in range(100):
        score = mean_score("m", draw.normal(2.0, 1.0, 30).tolist(), seed=seed)
        means += score.low < 2.0 < score.high  # type: ignore[operator]
        share = proportion("p", (draw.random(30) < 0.8).tolist())
        shares += share.low < 0.8 < share.high  # type: ignore[operator]
    assert 86 <= means <= 99 and 88 <= shares <= 99


def test_hits_of_two_models_are_tested_exactly() -> None:
    """McNemar by counting: of 7 items that differ, 6 are won; as many heads or more extreme in 7 fair tosses."""
    first = [True] * 5 + [False] * 6 + [True] + [False] * 3
    second = [True] * 5 + [True] * 6 + [False] + [False] * 3
    found = paired_test("acc", first, second)
    tosses = [sum(faces) for faces in itertools.product((0, 1), repeat=7)]
    assert found.p_value == pytest.approx(sum(abs(heads - 3.5) >= 2.5 for heads in tosses) / len(tosses))
    assert (found.wins, found.losses, found.ties) == (6, 1, 8) and found.method == "McNemar, exact"
    assert found.difference == pytest.approx(5 / 15) and found.low < 5 / 15 < found.high  # type: ignore[operator]


def test_real_values_are_tested_by_their_signs() -> None:
    """All 2^6 signs of the differences by hand."""
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.5, 2.6, 2.9, 4.9, 5.2, 6.7]
    found = paired_test("nats", first, second, weights=[1, 2, 1, 2, 1, 2])
    differences = np.subtract(second, first)
    sums = [np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean([abs(s) >= abs(differences.sum()) - 1e-9 for s in sums])
    assert found.p_value == pytest.approx(expected) and (found.wins, found.losses) == (5, 1)
    assert found.difference == pytest.approx(differences.sum() / 9)


def test_a_true_difference_is_found_and_none_is_not() -> None:
    draw = np.random.default_rng(0)
    first = draw.normal(size=80)
    better, alike = first + draw.normal(0.3, 0.5, 80), first + draw.normal(0, 0.5, 80)
    assert paired_test("x", first.tolist(), better.tolist()).p_value < 0.001
    assert paired_test("x", first.tolist(), alike.tolist()).p_value > 0.01


def test_little_to_go_by() -> None:
    one = mean_score("x", [3.0])
    assert (one.value, one.low, one.high) == (3.0, None, None)
    same = mean_score("x", [3.0] * 4)
    assert (same.value, same.low, same.high) == (3.0, 3.0, 3.0)
    found = paired_test("x", [1.0], [2.0])
    assert (found.p_value, found.low, found.wins) == (1.0, None, 1)
    assert paired_test("x", [1.0] * 3, [1.0] * 3).p_value == 1.0
    assert paired_test("x", [True], [True]).p_value == 1.0
    empty = mean_score("x", [3.0, 0.0, 5.0], weights=[1, 0, 1])  # a document without tokens
    assert empty.value == 4.0 and empty.low == 3.0


def test_what_is_refused() -> None:
    for call, message in (
        (lambda: proportion("acc", []), "acc has no items"),
        (lambda: mean_score("x", []), "x has no items"),
        (lambda: paired_test("x", [], []), "x has no items"),
        (lambda: mean_of_groups("x", [[True], []]), "x has no items"),
        (lambda: paired_test("x", [1.0], [1.0, 2.0]), "1 and 2 items; compare the same items"),
        (lambda: proportion("acc", [True], confidence=95), "confidence is 95; give --confidence"),
        (lambda: mean_score("x", [1.0, math.nan]), "x of item 2 is nan"),
        (lambda: mean_score("x", [1.0, 2.0], weights=[0, 0]), "x has only empty items"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_result_is_written_read_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [proportion("acc", [True, False, True]), mean_score("nats", [2.0])]
    rows = [{"id": f"d:{i}", "acc": hit} for i, hit in enumerate((True, False, True))]
    output = tmp_path / "out.json"
    settings = {"model": "https://me:password@host/m"}
    write_result(str(output), "choice", scores, settings, rows, {"acc": ("acc",)}, extra=1)
    result = read_result(str(output))
    assert result["num_samples"] == 3 and result["extra"] == 1 and result["rows"] == rows
    assert result["scores"][0]["low"] == scores[0].low and result["pairing"] == {"acc": ["acc"]}
    assert "password" not in output.read_text() and {"python", "torch"} <= result["versions"].keys()
    print_scores("Title", scores)
    shown = capsys.readouterr().out
    assert "66.7%" in shown and "—" in shown and "intervals: Wilson, bootstrap" in shown
    for text in ("[]", json.dumps({"scores": []})):
        output.write_text(text)
        with pytest.raises(InputError, match=str(output)):
            read_result(str(output))
    with pytest.raises(InputError, match="name a file in a directory that exists"):
        check_output(str(tmp_path / "no" / "out.json"))
    with pytest.raises(InputError, match="cannot be written"):
        check_output(str(tmp_path))


def test_commands_are_known_without_loading_anything() -> None:
    """And an unknown one is one sentence."""
    import subprocess
    import sys

    code = (
        "import sys, eval.__main__ as m; m.main([]); "
        "print([n for n in ('torch', 'scipy', 'numpy', 'transformers') if n in sys.modules])"
    )
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert shown.splitlines()[-1] == "[]" and all(name in shown for name in ("perplexity", "choice", "harness"))
    result = subprocess.run([sys.executable, "-m", "eval", "perplex"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(
        "error: Unknown evaluation 'perplex'; choose perplex"
    )


@pytest.mark.parametrize("command", ["perplexity", "choice", "exact_match", "preference", "harness", "compare"])
def test_help_loads_no_torch(command: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys, eval.__main__ as m\n"
        "try: m.main([sys.argv[1], '--help'])\n"
        "except SystemExit as stop: print(stop.code, [n for n in ('torch', 'scipy.stats') if n in sys.modules])"
    )
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", code, command]
    shown = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "0 []" and "--model" in shown
