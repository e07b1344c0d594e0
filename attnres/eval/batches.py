"""Groups requests into batches and finds their shared prefixes, from the tokens alone.

The batches do not depend on the number of processes, and so neither do the last bits of a score.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

SHORTEST_PREFIX = 16  # tokens; sharing fewer costs more forward passes than it saves


class Unit(NamedTuple):
    """The requests on one context, which always go into the same batch."""

    context: tuple[int, ...]  # tokens
    members: tuple[int, ...]  # indices of the requests
    longest: int = 0  # tokens of the longest answer to score
    weight: int = 1  # sequences that the unit takes up in a batch


class Batch(NamedTuple):
    """Indices of the requests in a batch, and the tokens that all their contexts start with (empty if not shared)."""

    members: tuple[int, ...]
    prefix: tuple[int, ...] = ()


def plan(units: Sequence[Unit], size: int, share: bool) -> list[Batch]:
    """Groups units into batches, the longest first and those with a common prefix together.

    Args:
        units: units to group.
        size: number of sequences per batch; a unit with a larger weight gets a batch of its own.
        share: whether the model can continue from the state after a prefix.
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
    """Yields each common prefix with its units, and at the end the units that share none."""
    alone: list[Unit] = []
    for run in _runs(sorted(units, key=lambda unit: (unit.context, unit.members))):
        # What the first and the last in lexicographic order share, all share. At least one token of every context is
        # kept, because its logits predict the next token.
        length = min(_common(run[0].context, run[-1].context), min(len(unit.context) for unit in run) - 1)
        if len(run) > 1 and length >= SHORTEST_PREFIX:
            yield run[0].context[:length], run
        else:
            alone += run
    if alone:
        yield (), alone


def _runs(ordered: list[Unit]) -> Iterator[list[Unit]]:
    """Splits units in lexicographic order where two neighbours share less than half of the shorter context."""
    run = ordered[:1]
    for before, unit in pairwise(ordered):
        shorter = min(len(before.context), len(unit.context))
        if _common(before.context, unit.context) >= max(SHORTEST_PREFIX, shorter / 2):
            run.append(unit)
        else:
            yield run
            run = [unit]
    if run:
        yield run


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of tokens that two contexts start with."""
    differing = (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))
