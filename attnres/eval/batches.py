"""Groups requests into batches and finds the tokens that they share, from the tokens alone.

So the batches, and with them the last bits of a score, are the same however many processes run them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

SHORTEST_PREFIX = 16  # tokens; a shorter one costs more passes than it saves


@dataclass(frozen=True)
class Unit:
    """What is not taken apart: a context with the requests that ask about it.

    Attributes:
        context: tokens.
        members: numbers of the requests.
        longest: tokens of the longest answer to be scored.
        weight: sequences that it takes of a batch.
    """

    context: tuple[int, ...]
    members: tuple[int, ...]
    longest: int = 0
    weight: int = 1


@dataclass(frozen=True)
class Batch:
    """Numbers of requests, and the tokens with which all their contexts start (none unless that saves work)."""

    members: tuple[int, ...]
    prefix: tuple[int, ...] = ()


def plan(units: Sequence[Unit], size: int, share: bool) -> list[Batch]:
    """Batches of units, the longest first, those with a common start together.

    Args:
        size: sequences per batch; a unit that weighs more has one of its own.
        share: whether the model can go on from the state after a prefix.
    """
    batches = []
    for prefix, group in _by_prefix(units) if share else [((), list(units))]:
        group.sort(key=lambda unit: (-len(unit.context) - unit.longest, unit.context, unit.members))
        members: list[int] = []
        weight = 0
        for unit in group:
            if members and weight + unit.weight > size:
                batches.append(Batch(tuple(members), prefix))
                members, weight = [], 0
            members += unit.members
            weight += unit.weight
        if members:
            batches.append(Batch(tuple(members), prefix))
    return batches


def _by_prefix(units: Sequence[Unit]) -> Iterator[tuple[tuple[int, ...], list[Unit]]]:
    """Units whose contexts start with the same examples, with that start; last those that share none.

    In lexicographic order such units are neighbours, and what neighbours share on the whole way is shared by all.
    """
    alone: list[Unit] = []
    for run in _runs(sorted(units, key=lambda unit: (unit.context, unit.members))):
        first, last = run[0].context, run[-1].context
        # At least one token stays, whose logits say what comes next.
        length = min(_common(first, last), min(len(unit.context) for unit in run) - 1)
        if len(run) > 1 and length >= SHORTEST_PREFIX:
            yield first[:length], run
        else:
            alone += run
    if alone:
        yield (), alone


def _runs(ordered: list[Unit]) -> Iterator[list[Unit]]:
    run = ordered[:1]
    for before, unit in pairwise(ordered):
        common = _common(before.context, unit.context)
        if common >= max(SHORTEST_PREFIX, min(len(before.context), len(unit.context)) / 2):
            run.append(unit)
        else:
            yield run
            run = [unit]
    if run:
        yield run


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two sequences start with."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
