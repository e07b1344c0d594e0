"""Rounds, ratios and their spread, with a clock that says what it is told."""

import pytest

from attnres.bench.timing import Sample, compare, interleave, spread


class Machine:
    """A clock that moves on when work is done; `cost(variant, round)` seconds, and one second for what is not timed."""

    def __init__(self, cost):
        self.now, self.cost, self.order, self.calls = 0.0, cost, [], {}

    def sample(self, name):
        def run(prepared):
            assert prepared == f"prepared {name}"
            self.calls[name] = self.calls.get(name, 0) + 1
            self.now += self.cost(name, self.calls[name])
            self.order.append(name)

        def outside(value=None):
            self.now += 1
            return value

        return Sample(run, lambda: outside(f"prepared {name}"), outside)

    def seconds(self, names, rounds, **options):
        return interleave({name: self.sample(name) for name in names}, rounds, clock=lambda: self.now, **options)


def test_every_variant_runs_once_a_round_in_an_order_that_rotates():
    machine = Machine(lambda name, call: 0.5)
    machine.seconds("abc", 3, warmup=0)
    assert "".join(machine.order) == "abcbcacab"


def test_only_the_run_is_timed_and_warming_up_does_not_count():
    machine = Machine(lambda name, call: 100.0 if call <= 2 else {"a": 2.0, "b": 3.0}[name])
    assert machine.seconds("ab", 2, warmup=2) == {"a": [2.0, 2.0], "b": [3.0, 3.0]}


def test_an_accelerator_is_awaited_before_both_readings_of_the_clock():
    machine = Machine(lambda name, call: 1.0)

    def synchronize():
        machine.now += 10

    assert machine.seconds("a", 1, warmup=0, synchronize=synchronize) == {"a": [11.0]}


def test_progress_is_told_of_every_run():
    told = []
    Machine(lambda name, call: 1.0).seconds("ab", 2, warmup=1, after_sample=lambda: told.append(1))
    assert len(told) == 6


def test_ratios_are_taken_within_a_round_so_that_a_slow_spell_cancels_out():
    # Every second round the machine is ten times slower: medians of times would compare different rounds.
    seconds = {"plain": [1.0, 10.0, 1.0, 10.0, 1.0], "other": [1.5, 15.0, 1.5, 15.0, 1.5]}
    measured = compare(seconds, "plain")
    assert measured["other"]["ratio"] == {"median": 1.5, "q1": 1.5, "q3": 1.5}
    assert measured["plain"]["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
    measured = compare({"plain": [1.0, 2.0, 4.0], "other": [2.0, 3.0, 4.0]}, "plain")
    assert measured["other"]["ratio"]["median"] == 1.5  # of 2, 1.5 and 1
    assert measured["other"]["seconds"]["median"] == 3.0


def test_times_are_per_step_and_ratios_are_not_touched_by_it():
    measured = compare({"plain": [8.0], "other": [16.0]}, "plain", divisor=4)
    assert measured["other"]["samples"] == [4.0]
    assert measured["other"]["seconds"]["median"] == 4.0
    assert measured["other"]["ratio"]["median"] == 2.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0, 3.0)), ([1.0, 2.0], (1.25, 1.5, 1.75)), ([5.0, 1.0, 2.0, 4.0, 3.0], (2.0, 3.0, 4.0))],
)
def test_spread_is_the_median_with_the_quartiles(values, expected):
    assert spread(values) == dict(zip(("q1", "median", "q3"), expected, strict=True))
