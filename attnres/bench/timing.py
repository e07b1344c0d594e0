"""Interleaved timing. Each variant runs once per round, in rotating order, so that a slow spell of the machine affects
all of them; the result is the ratio to the baseline within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The part of one variant in a round."""

    run: Callable  # timed; its argument is the result of `prepare`
    prepare: Callable[[], object] = lambda: None  # runs before, untimed
    finish: Callable[[], None] = lambda: None  # runs afterwards, untimed


def interleave(
    samples: Mapping[str, Sample],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    after_sample: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Measures the seconds of every variant in every round, after `warmup` rounds that do not count.

    `synchronize` waits for an accelerator.
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
    """Returns median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def compare(seconds: Mapping[str, list[float]], baseline: str, divisor: int = 1) -> dict[str, dict]:
    """Returns, per variant, median and quartiles of the ratio to the baseline within each round, and of the seconds.

    The seconds, of `interleave`, are divided by the units of work in one run, such as tokens.
    """
    return {
        name: {
            "ratio": spread([each / base for each, base in zip(values, seconds[baseline], strict=True)]),
            "seconds": spread([each / divisor for each in values]),
            "samples": [each / divisor for each in values],
        }
        for name, values in seconds.items()
    }
