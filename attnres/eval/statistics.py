"""Paired statistics from plain arrays: exact McNemar, stratified bootstrap, equivalence, Holm.

Notation: b items that only the second model got right (wins), c that only the first did (losses), N pairs; the
difference is (b - c) / N.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Test(NamedTuple):
    """A difference, its 95 % interval and two-sided p value; all in the unit of the values."""

    __test__ = False  # not one of pytest's

    difference: float
    low: float
    high: float
    p: float
    method: str


def mcnemar(first: Sequence[float], second: Sequence[float]) -> Test:
    """Exact test on the discordant pairs of 0/1 values, which are binomial (b + c, 1/2) if the models are equal.

    The interval is Newcombe's for paired proportions (1998, method 10): unlike b - c plus or minus a normal error
    it stays within -1 and 1, and does not shrink to nothing where the models agree on every item.

    Raises:
        ValueError: the arrays differ in length, are empty or hold other values than 0 and 1.
    """
    first, second = _paired(first, second)
    if not is_binary(first) or not is_binary(second):
        raise ValueError("McNemar's test takes 0 and 1 only")
    from scipy.stats import binomtest

    wins, losses = int(np.sum(second > first)), int(np.sum(second < first))
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    low, high = newcombe(int(np.sum((first == 1) & (second == 1))), losses, wins, int(np.sum((first + second) == 0)))
    return Test((wins - losses) / len(first), low, high, float(p), "exact McNemar")


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired proportions, second minus first, from Wilson's intervals."""
    total = both + only_first + only_second + neither
    second, first = (both + only_second) / total, (both + only_first) / total
    (low_2, high_2), (low_1, high_1) = wilson(both + only_second, total), wilson(both + only_first, total)
    margins = (both + only_second) * (only_first + neither) * (both + only_first) * (only_second + neither)
    product = both * neither - only_first * only_second
    # Newcombe's continuity correction of phi, for positive association only.
    phi = (max(product - total / 2, 0) if product > 0 else product) / np.sqrt(float(margins)) if margins else 0.0
    delta = second - first
    down_2, up_2, down_1, up_1 = second - low_2, high_2 - second, first - low_1, high_1 - first
    down = np.sqrt(max(down_2**2 - 2 * phi * down_2 * up_1 + up_1**2, 0.0))
    up = np.sqrt(max(down_1**2 - 2 * phi * down_1 * up_2 + up_2**2, 0.0))
    return float(max(delta - down, -1.0)), float(min(delta + up, 1.0))


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    macro: bool = False,
) -> Test:
    """Percentile interval and p value of the mean difference, items redrawn with their pair within their subtask.

    The spread of each subtask is widened by sqrt(n / (n - 1)): a redrawn sample varies too little by that factor.
    p is twice the share of resampled differences on the far side of zero. Where all pairs are equal the interval is
    Wilson's for none of N, for values between 0 and 1.

    Args:
        strata: subtask of each item; the number of items per subtask stays as it is.
        macro: the mean of the subtasks' means instead of the mean over items.

    Raises:
        ValueError: the arrays differ in length or are empty, or a value is not finite.
    """
    first, second = _paired(first, second)
    differences = second - first
    observed, drawn = _redrawn(differences, strata, resamples, seed, macro)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # Twice the smaller tail. Exact zeros count on both sides: where all pairs are equal, p is 1.
    tolerance = 1e-12
    tails = min(np.sum(drawn <= tolerance), np.sum(drawn >= -tolerance))
    p = float(min(1.0, 2 * (tails + 1) / (resamples + 1)))
    method = f"paired bootstrap, {resamples} resamples"
    if not differences.any():
        # Redrawing equal pairs shows no spread, which is no certainty: more items could differ.
        reach = wilson(0, len(differences))[1]
        low, high, method = -reach, reach, f"{method}; interval: Wilson's, as no item differs"
    return Test(observed, float(low), float(high), p, method)


def equivalence(
    first: Sequence[float],
    second: Sequence[float],
    margin: float,
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    macro: bool = False,
) -> tuple[float, str]:
    """Two one-sided tests (TOST) of a difference of `margin` or more in either direction; the larger p, and the method.

    0/1 values, and values of which no pair differs: Tango's score tests (1998), which also where all items agree know
    that there are N of them only. Others, and means of subtasks: shares of the redrawn differences at or beyond the
    margin.

    Args:
        margin: above 0 and below 1, in the unit of the values, which lie between 0 and 1.

    Raises:
        ValueError: as `paired_bootstrap`, or the margin is none.
    """
    if not 0 < margin < 1:
        raise ValueError(f"a margin of equivalence lies between 0 and 1 (100 points), got {margin}")
    first, second = _paired(first, second)
    differences = second - first
    binary = is_binary(first) and is_binary(second)
    if (binary and not macro) or not differences.any():
        wins, losses = int(np.sum(differences > 0)), int(np.sum(differences < 0))
        # The second test is the first with the models exchanged.
        p = max(tango(wins, losses, len(differences), margin), tango(losses, wins, len(differences), margin))
        return p, "Tango's score tests"
    _, drawn = _redrawn(differences, strata, resamples, seed, macro)
    beyond = max(int(np.sum(drawn <= -margin)), int(np.sum(drawn >= margin)))
    return (beyond + 1) / (resamples + 1), f"paired bootstrap, {resamples} resamples"


def tango(wins: int, losses: int, total: int, margin: float) -> float:
    """One-sided p of Tango's score test that the second model is worse by `margin` or more.

    The share of losses is estimated by maximum likelihood under that hypothesis, a quadratic equation (Tango, 1998).
    """
    from scipy.stats import norm

    # The hypothesis: share of wins - share of losses = -margin.
    linear = -wins - losses + (2 * total - losses + wins) * margin
    constant = -wins * margin * (1 - margin)
    share = (np.sqrt(linear**2 - 8 * total * constant) - linear) / (4 * total)  # of wins; losses: that plus the margin
    variance = total * (2 * share + margin * (1 - margin))
    return float(norm.sf((wins - losses + total * margin) / np.sqrt(variance)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: those below alpha are significant at alpha over all rows together."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _redrawn(
    differences: np.ndarray, strata: Sequence[Hashable] | None, resamples: int, seed: int, macro: bool
) -> tuple[float, np.ndarray]:
    """The mean difference, and that of every redrawn sample `[resamples]`."""
    groups = [differences] if strata is None else _grouped(differences, strata)
    weights = [1 / len(groups) if macro else len(group) / len(differences) for group in groups]
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for group, weight in zip(groups, weights, strict=True):
        mean, size = group.mean(), len(group)
        widen = np.sqrt(size / (size - 1)) if size > 1 else 1.0
        # In portions: 10,000 times 10,000 items are 800 MB.
        portion = max(1, 4_000_000 // size)
        for start in range(0, resamples, portion):
            count = min(portion, resamples - start)
            means = group[generator.integers(0, size, (count, size))].mean(axis=1)
            drawn[start : start + count] += weight * (mean + widen * (means - mean))
    observed = float(sum(weight * group.mean() for group, weight in zip(groups, weights, strict=True)))
    return observed, drawn


def is_binary(values) -> bool:
    return bool(np.all((np.asarray(values) == 0) | (np.asarray(values) == 1)))


def _paired(first, second) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"pairs need two arrays of one length above 0, got {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a value is not finite")
    return first, second


def _grouped(differences: np.ndarray, strata: Sequence[Hashable]) -> list[np.ndarray]:
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    return [differences[indices] for indices in members.values()]
