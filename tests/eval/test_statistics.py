"""Paired statistics against scipy, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binomtest, norm, ttest_rel

from attnres.eval.statistics import equivalence, holm, mcnemar, newcombe, paired_bootstrap, tango, wilson


def pairs_of(both, only_first, only_second, neither):
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 2), (5, 5), (0, 11)])
def test_mcnemar_counts_every_way_in_which_the_discordant_pairs_could_have_fallen(wins, losses):
    test = mcnemar(*pairs_of(13, losses, wins, 4))
    discordant = wins + losses
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=discordant)]
    extreme = np.mean([abs(fall - discordant / 2) >= abs(wins - discordant / 2) for fall in falls])
    assert test.p == pytest.approx(extreme)
    assert test.p == pytest.approx(binomtest(wins, discordant).pvalue if discordant else 1)
    assert test.difference == pytest.approx((wins - losses) / (17 + discordant))
    assert test.low <= test.difference <= test.high and test.low >= -1 and test.high <= 1


def test_newcombes_interval_is_that_of_his_own_example():
    """Newcombe 1998, table II: 36, 12, 2, 0 of 50 give 0.20 with 0.0569 to 0.3404 (method 10)."""
    low, high = newcombe(36, 2, 12, 0)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_models_that_agree_on_every_item_have_an_interval_all_the_same():
    test = mcnemar([1] * 8 + [0] * 4, [1] * 8 + [0] * 4)
    assert test.p == 1 and test.low < -0.05 and test.high > 0.05


def test_swapping_the_models_turns_the_result_round():
    first, second = pairs_of(30, 4, 11, 9)
    forth, back = mcnemar(first, second), mcnemar(second, first)
    assert (back.difference, back.low, back.high) == pytest.approx((-forth.difference, -forth.high, -forth.low))
    assert back.p == forth.p


def test_bootstrap_agrees_with_the_t_test_on_normal_differences():
    random = np.random.default_rng(3)
    first = random.normal(size=400)
    second = first + random.normal(0.08, 0.9, size=400)
    test, exact = paired_bootstrap(first, second), ttest_rel(second, first)
    interval = exact.confidence_interval()
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high), abs=0.01)
    assert test.p == pytest.approx(exact.pvalue, abs=0.02)
    assert test == paired_bootstrap(first, second) and test.p != paired_bootstrap(first, second, seed=1).p


def test_strata_take_the_difference_between_subtasks_out_of_the_spread():
    differences = np.r_[np.full(50, 5.0), np.full(50, -5.0)] + np.tile([0.1, -0.1], 50)
    strata = ["a"] * 50 + ["b"] * 50
    wide, narrow = (
        paired_bootstrap(0 * differences, differences),
        paired_bootstrap(0 * differences, differences, strata),
    )
    assert narrow.high - narrow.low < 0.06 < 1 < wide.high - wide.low


def test_macro_weighs_subtasks_alike():
    first, second = np.zeros(12), np.r_[np.ones(10), 0, 0]
    strata = ["large"] * 10 + ["small"] * 2
    assert paired_bootstrap(first, second, strata).difference == pytest.approx(10 / 12)
    assert paired_bootstrap(first, second, strata, macro=True).difference == pytest.approx(0.5)


def test_equal_values_are_no_difference():
    """Which is no certainty either: the interval is as wide as for five items of which none differs."""
    reach = wilson(0, 5)[1]
    assert paired_bootstrap([0.25] * 5, [0.25] * 5)[:4] == (0, -reach, reach, 1) and reach > 0.4


@pytest.mark.parametrize("effect", [0.0, 0.1], ids="effect{}".format)
def test_coverage_and_type_one_error_of_mcnemar(effect):
    random = np.random.default_rng(11)
    covered, rejected, runs = 0, 0, 400
    for _ in range(runs):
        ability = random.beta(2, 2, size=150) * (1 - effect)
        first = random.random(150) < ability
        second = random.random(150) < ability + effect
        test = mcnemar(first, second)
        covered += test.low <= effect <= test.high
        rejected += test.p < 0.05
    assert covered / runs > 0.93
    assert rejected / runs < 0.05 if effect == 0 else rejected / runs > 0.3


@pytest.mark.parametrize("effect", [0.0, 0.15], ids="effect{}".format)
def test_coverage_and_type_one_error_of_the_bootstrap(effect):
    random = np.random.default_rng(12)
    strata = np.repeat(["a", "b", "c"], [40, 25, 15])
    offset = np.repeat([0.0, 1.0, -2.0], [40, 25, 15])
    covered, rejected, runs = 0, 0, 400
    for seed in range(runs):
        first = random.exponential(size=80)
        second = first + offset - offset.mean() + effect + random.normal(0, 0.6, size=80)
        test = paired_bootstrap(first, second, strata, resamples=500, seed=seed)
        covered += test.low <= effect <= test.high
        rejected += test.p < 0.05
    assert 0.91 < covered / runs < 0.98
    assert rejected / runs < 0.085 if effect == 0 else rejected / runs > 0.4


def test_holm_is_the_step_down_procedure():
    """Adjusted values worked out by hand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


def test_holm_keeps_the_error_over_all_rows():
    random = np.random.default_rng(5)
    assert np.mean([min(holm(random.random(15))) < 0.05 for _ in range(4000)]) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("seed", range(5))
def test_tangos_test_takes_the_likeliest_share_of_losses_under_the_hypothesis(seed):
    generator = np.random.default_rng(seed)
    total = int(generator.integers(30, 300))
    wins, losses = generator.integers(0, total // 4, 2).tolist()
    margin = float(generator.uniform(0.01, 0.2))

    def unlikely(share):
        others = total - wins - losses
        return -(xlogy(wins, share) + xlogy(losses, share + margin) + xlogy(others, 1 - 2 * share - margin))

    bounds = (1e-12, (1 - margin) / 2 - 1e-12)
    share = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
    deviation = np.sqrt(total * (2 * share + margin - margin**2))
    assert tango(wins, losses, total, margin) == pytest.approx(
        norm.sf((wins - losses + total * margin) / deviation), rel=1e-4
    )


def test_equal_answers_are_shown_to_be_the_same_only_where_there_are_enough():
    for count, margin, same in ((10, 0.05, False), (164, 0.02, True), (164, 0.01, False), (1009, 0.01, True)):
        values = np.random.default_rng(count).integers(0, 2, count)
        p, method = equivalence(values, values, margin)
        assert (p < 0.05) == same
        assert method == "Tango's score tests"
        fractions = np.random.default_rng(count).random(count)
        assert equivalence(fractions, fractions, margin) == (p, method)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_difference_beyond_the_margin_is_never_the_same(direction):
    generator = np.random.default_rng(0)
    first = generator.random(997)
    second = first + direction * generator.uniform(0.03, 0.05, 997)
    assert equivalence(first, second, 0.03, resamples=200)[0] == 1
    assert equivalence(first, second, 0.05, resamples=200)[0] == 1 / 201
    before, after = np.zeros(997), (np.arange(997) % 20 == 0).astype(float)
    before, after = (before, after)[::direction]
    assert equivalence(before, after, 0.03)[0] > 0.5 and equivalence(before, after, 0.1)[0] < 1e-6


def test_two_one_sided_tests_keep_their_level_at_the_margin():
    """Models whose true difference is the margin are called the same in at most about 5 % of the cases."""
    generator = np.random.default_rng(1)
    margin, found = 0.05, 0
    for _ in range(400):
        kind = generator.choice(3, 301, p=[0.1 + margin, 0.1, 0.8 - margin])
        found += equivalence(1.0 * (kind != 0), 1.0 * (kind != 1), margin)[0] < 0.05
    assert found / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
