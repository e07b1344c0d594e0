"""Interleaved timing: each variant runs once per round, in rotating order, so that a slow spell of the machine
falls on all of them; what counts is the ratio to the baseline within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One variant's part in a round.

    Attributes:
        run: what is timed; takes what `prepare` returned.
        prepare, finish: before and after, not timed.
    """

    run: Callable
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], None] = lambda: None


def interleave(
    samples: Mapping[str, Sample],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    after_sample: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    Args:
        samples: per variant what to run.
        rounds: that count; `warmup` more come first.
        clock: in seconds.
        synchronize: waits for an accelerator.
        after_sample: called after each, for progress.
    """
    names = list(samples)
    seconds = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            sample = samples[name]
            prepared = sample.prepare()
            synchronize()
            start = clock()
            sample.run(prepared)
            synchronize()
            elapsed = clock() - start
            del prepared
            sample.finish()
            if number >= 0:
                seconds[name].append(elapsed)
            after_sample()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def compare(seconds: Mapping[str, list[float]], baseline: str, divisor: int = 1) -> dict[str, dict]:
    """Per variant the ratio to the baseline, taken within each round, and the seconds, each as median and quartiles.

    Args:
        seconds: what `interleave` returned.
        baseline: the variant to divide by.
        divisor: units of work, such as tokens, in one run; `seconds` are per unit.
    """
    return {
        name: {
            "ratio": spread([each / base for each, base in zip(values, seconds[baseline], strict=True)]),
            "seconds": spread([each / divisor for each in values]),
            "samples": [each / divisor for each in values],
        }
        for name, values in seconds.items()
    }
