"""Paired statistics on plain arrays: exact McNemar test, stratified bootstrap, equivalence tests, Holm's correction.

Notation: wins are items that only the second model got right, losses those that only the first did, and
difference = (wins - losses) / number of items.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
Values = Sequence[float]
Strata = Sequence[Hashable] | None


class Difference(NamedTuple):
    """A difference with its 95 % interval, in the unit of the values, and its two-sided p value."""

    difference: float
    low: float
    high: float
    p: float
    method: str


def mcnemar(first: Values, second: Values) -> Difference:
    """Runs McNemar's exact test on 0/1 values: the wins are binomial (wins + losses, 1/2) if the models are equal.

    The interval is Newcombe's for paired proportions (1998, method 10). Unlike a normal approximation, it stays within
    -1 and 1 and keeps a width above 0 where the models agree on every item.
    """
    first, second = np.asarray(first), np.asarray(second)
    wins, losses = int(np.sum(second > first)), int(np.sum(second < first))
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    low, high = newcombe(int(np.sum(first * second)), losses, wins, int(np.sum((first + second) == 0)))
    return Difference((wins - losses) / len(first), low, high, float(p), "exact McNemar")


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """Returns Newcombe's 95 % interval of the difference of two paired proportions, second minus first."""
    total = both + only_first + only_second + neither
    second, first = (both + only_second) / total, (both + only_first) / total
    (low_2, high_2), (low_1, high_1) = wilson(both + only_second, total), wilson(both + only_first, total)
    margins = (both + only_second) * (only_first + neither) * (both + only_first) * (only_second + neither)
    product = both * neither - only_first * only_second
    # The continuity correction of phi applies to positive association only.
    phi = (max(product - total / 2, 0) if product > 0 else product) / np.sqrt(float(margins)) if margins else 0.0
    delta = second - first
    down_2, up_2, down_1, up_1 = second - low_2, high_2 - second, first - low_1, high_1 - first
    down = np.sqrt(max(down_2**2 - 2 * phi * down_2 * up_1 + up_1**2, 0.0))
    up = np.sqrt(max(down_1**2 - 2 * phi * down_1 * up_2 + up_2**2, 0.0))
    return float(max(delta - down, -1.0)), float(min(delta + up, 1.0))


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Returns Wilson's 95 % score interval of a proportion."""
    interval = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def paired_bootstrap(
    first: Values, second: Values, strata: Strata = None, *, resamples: int = 10_000, seed: int = 0, macro: bool = False
) -> Difference:
    """Resamples pairs within their subtask: percentile interval and p value of the mean difference.

    The spread within each subtask of n items is widened by sqrt(n / (n - 1)), because a resample varies too little by
    that factor. p is twice the share of resampled differences on the other side of zero. If all pairs are equal, the
    interval is Wilson's for 0 of N; this takes values between 0 and 1.

    Args:
        first, second: values of the two models on the same items.
        strata: subtask of each item; the number of items per subtask is kept.
        resamples, seed: number of resamples, and seed of the resampling.
        macro: whether to average the subtasks' means instead of the items.
    """
    differences = np.subtract(second, first)
    observed, drawn = _resampled(differences, strata, resamples, seed, macro)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # Differences of exactly zero count on both sides: p is 1 if all pairs are equal.
    tolerance = 1e-12
    tails = min(np.sum(drawn <= tolerance), np.sum(drawn >= -tolerance))
    p = float(min(1.0, 2 * (tails + 1) / (resamples + 1)))
    method = f"paired bootstrap, {resamples} resamples"
    if not differences.any():
        # Resampling equal pairs shows no spread, although other items could differ.
        reach = wilson(0, len(first))[1]
        low, high, method = -reach, reach, f"{method}; interval: Wilson's, as no item differs"
    return Difference(observed, float(low), float(high), p, method)


def equivalence(
    first: Values,
    second: Values,
    margin: float,
    strata: Strata = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    macro: bool = False,
) -> tuple[float, str]:
    """Runs two one-sided tests (TOST) of a difference of `margin` or more; returns the larger p and the method.

    Values of 0 and 1, and pairs that are all equal, use Tango's score tests (1998), which take the number of items into
    account even if no item differs. Other values, and means over subtasks, use the shares of resampled differences at
    or beyond the margin, which is in the unit of the values, above 0 and below 1. Other arguments are those of
    `paired_bootstrap`.
    """
    differences = np.subtract(second, first)
    if (is_binary(first, second) and not macro) or not differences.any():
        wins, losses = int(np.sum(differences > 0)), int(np.sum(differences < 0))
        # The test in the other direction is the same one with the models swapped.
        p = max(tango(wins, losses, len(differences), margin), tango(losses, wins, len(differences), margin))
        return p, "Tango's score tests"
    _, drawn = _resampled(differences, strata, resamples, seed, macro)
    beyond = max(int(np.sum(drawn <= -margin)), int(np.sum(drawn >= margin)))
    return (beyond + 1) / (resamples + 1), f"paired bootstrap, {resamples} resamples"


def tango(wins: int, losses: int, total: int, margin: float) -> float:
    """Returns the one-sided p of Tango's score test that the second model is worse by `margin` or more.

    Under this hypothesis, share of losses = share of wins + margin. The share of wins is estimated by maximum
    likelihood, which is a quadratic equation (Tango, 1998).
    """
    linear = -wins - losses + (2 * total - losses + wins) * margin
    constant = -wins * margin * (1 - margin)
    share = (np.sqrt(linear**2 - 8 * total * constant) - linear) / (4 * total)
    variance = total * (2 * share + margin * (1 - margin))
    return float(norm.sf((wins - losses + total * margin) / np.sqrt(variance)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted by Holm's step-down procedure, in the order given."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    steps = np.minimum(np.arange(len(values), 0, -1) * values[order], 1)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def is_binary(*values) -> bool:
    """Returns whether all values are 0 or 1."""
    return bool(np.isin(values, (0, 1)).all())


def _resampled(
    differences: np.ndarray, strata: Strata, resamples: int, seed: int, macro: bool
) -> tuple[float, np.ndarray]:
    """Returns the mean difference, and that of every resample: `[resamples]`."""
    groups = [differences]
    if strata is not None:
        labels = np.asarray(strata)
        groups = [differences[labels == label] for label in dict.fromkeys(labels.tolist())]
    generator = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(resamples)
    for group in groups:
        mean, size = group.mean(), len(group)
        weight = 1 / len(groups) if macro else size / len(differences)
        observed += weight * mean
        widen = np.sqrt(size / (size - 1)) if size > 1 else 1.0
        # In portions, because 10,000 resamples of 10,000 items would take 800 MB.
        portion = max(1, 4_000_000 // size)
        for start in range(0, resamples, portion):
            count = min(portion, resamples - start)
            means = group[generator.integers(0, size, (count, size))].mean(axis=1)
            drawn[start : start + count] += weight * (mean + widen * (means - mean))
    return float(observed), drawn
