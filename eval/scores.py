"""Scores with confidence intervals, and paired tests of two models on the same items.

A share of h hits in n gets Wilson's interval, the p for which |h / n - p| <= z sqrt(p (1 - p) / n): it stays
within 0 and 1, and has a width even if all or none are hits.

A mean, or a ratio of sums such as perplexity's

    exp(sum over documents of nats_i / sum over documents of tokens_i)

gets a percentile bootstrap interval: whole documents are resampled with replacement, since tokens of one document
are not independent.

Two models answer the same n items, so the test uses each item's difference:

    hits          McNemar's exact test: of the b + c items where only one model hits, is b consistent with a fair
                  coin? Interval of the difference after Agresti and Min (2005): half an item is added to each of
                  the four cells of the table.
    real values   sign flips: if the models were equal, each difference could equally well have the other sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.system.errors import InputError

RESAMPLES = 9999
_CELLS = 2**22  # values of the resampled matrix held at a time


@dataclass(frozen=True)
class Score:
    """A value with its interval; low and high are None if there are too few samples for one."""

    name: str
    value: float
    low: float | None
    high: float | None
    confidence: float
    method: str
    num_samples: int


@dataclass(frozen=True)
class Comparison:
    """Difference of the second model from the first on the same items; wins: the second one is higher."""

    name: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    confidence: float
    p_value: float
    method: str
    num_samples: int
    wins: int
    losses: int
    ties: int


def proportion(name: str, hits: Sequence[bool], confidence: float = 0.95) -> Score:
    """The share of hits, with Wilson's interval.

    Raises:
        InputError: no items, or a confidence not between 0 and 1.
    """
    from scipy.stats import binomtest

    _check(name, len(hits), confidence)
    found = binomtest(sum(map(bool, hits)), len(hits))
    interval = found.proportion_ci(confidence_level=confidence, method="wilson")
    low, high = float(interval.low), float(interval.high)
    return Score(name, float(found.statistic), low, high, confidence, "Wilson", len(hits))


def mean_score(
    name: str,
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    transform: Callable[[Any], Any] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Score:
    """The mean of `values`, or sum(values) / sum(weights), with a percentile bootstrap interval over the items.

    Args:
        values: one finite number per item: a score, or a document's sum.
        weights: number of terms in each item's sum, such as its tokens.
        transform: increasing function of the mean, on arrays, such as numpy.exp.
        seed: for resampling.
    Raises:
        InputError: no items, weights that sum to 0, or a value that is not finite.
    """
    _check(name, len(values), confidence)
    numerators, denominators = _arrays(name, values, weights)
    ratio = numerators.sum() / denominators.sum()
    low, high = _bootstrap(numerators, denominators, seed, confidence)
    change = transform or (lambda x: x)
    low, high = (None if end is None else float(change(end)) for end in (low, high))
    return Score(name, float(change(ratio)), low, high, confidence, "bootstrap", len(values))


def mean_of_groups(name: str, groups: Sequence[Sequence[bool]], seed: int = 0, confidence: float = 0.95) -> Score:
    """The unweighted mean of the groups' shares of hits, as for MMLU's subjects in QLoRA.

    The interval resamples the items of each group; the groups are fixed.
    """
    _check(name, min(map(len, groups), default=0), confidence)
    sizes = np.array([len(group) for group in groups])
    shares = np.array([sum(map(bool, group)) for group in groups]) / sizes
    drawn = np.random.default_rng(seed).binomial(sizes, shares, (RESAMPLES, len(sizes))) / sizes
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn.mean(axis=1), [tail, 1 - tail])
    count = int(sizes.sum())
    return Score(name, float(shares.mean()), float(low), float(high), confidence, "bootstrap in subjects", count)


def paired_test(
    name: str,
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """How much higher the second model scores than the first on the same items, and whether it may be chance.

    Args:
        first, second: one value per item, in the same order: all booleans (hits), or real numbers.
        weights: as in `mean_score`, the same for both models, such as the bytes of a document.
    Returns:
        Comparison with the two-sided p-value, which is 1 if the models do not differ on any item.
    Raises:
        InputError: no items, or different numbers of items.
    """
    _check(name, len(first), confidence)
    if len(first) != len(second):
        raise InputError(f"{name} was measured on {len(first)} and {len(second)} items; compare the same items.")
    is_hits = weights is None and all(isinstance(value, (bool, np.bool_)) for value in (*first, *second))
    a, denominators = _arrays(name, first, weights)
    b, _ = _arrays(name, second, weights)
    difference = b - a
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low: float | None
    high: float | None
    if is_hits:
        low, high = _agresti_min(wins, losses, len(a), confidence)
        p_value, method = _mcnemar(wins, losses), "McNemar, exact"
    else:
        low, high = _bootstrap(difference, denominators, seed, confidence)
        p_value, method = _sign_flips(difference, seed), "sign flips"
    total = denominators.sum()
    means = float(a.sum() / total), float(b.sum() / total), float(difference.sum() / total)
    ties = len(a) - wins - losses
    return Comparison(name, *means, low, high, confidence, p_value, method, len(a), wins, losses, ties)


def _check(name: str, count: int, confidence: float) -> None:
    if count == 0:
        raise InputError(f"{name} has no items; give data with at least one.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; give --confidence a number between 0 and 1, such as 0.95.")


def _arrays(name: str, values: Sequence[float], weights: Sequence[float] | None) -> tuple[Any, Any]:
    """Values and weights as float64 (n,)."""
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones(len(numerators)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(numerators) != len(denominators):
        raise ValueError(f"{name} has {len(numerators)} values but {len(denominators)} weights.")
    if not np.isfinite(numerators).all():
        place = int(np.flatnonzero(~np.isfinite(numerators))[0])
        raise InputError(f"{name} of item {place + 1} is {numerators[place]}; check the model and that item.")
    if (denominators < 0).any() or denominators.sum() == 0:
        raise InputError(f"{name} has only empty items; give data with text.")
    return numerators, denominators


def _bootstrap(
    numerators: Any, denominators: Any, seed: int, confidence: float
) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of sum(numerators) / sum(denominators); none for fewer than two non-empty items."""
    from scipy.stats import bootstrap

    counted = denominators > 0  # a sample of only empty documents would have no ratio
    numerators, denominators = numerators[counted], denominators[counted]
    if len(numerators) < 2:
        return None, None
    found = bootstrap(
        (numerators, denominators),
        lambda n, d, axis: n.sum(axis=axis) / d.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _CELLS // len(numerators)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mcnemar(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _agresti_min(wins: int, losses: int, count: int, confidence: float) -> tuple[float, float]:
    from scipy.stats import norm

    b, c, n = wins + 0.5, losses + 0.5, count + 2.0
    middle = (b - c) / n
    width = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    return max(-1.0, middle - width), min(1.0, middle + width)


def _sign_flips(difference: Any, seed: int) -> float:
    """Two-sided p-value of the sum of the differences; exact up to 13 of them that are not 0."""
    from scipy.stats import permutation_test

    difference = difference[difference != 0]
    if len(difference) < 2:  # at most one differs, and it is as large with the other sign
        return 1.0
    found = permutation_test(
        (difference,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",  # of one sample: its signs
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _CELLS // len(difference)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
