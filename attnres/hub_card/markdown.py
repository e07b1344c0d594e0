"""Escapes untrusted strings for Markdown."""

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$])")


def plain(value) -> str:
    """A value as text that Markdown takes for nothing else: on one line, with marks escaped."""
    text = "".join(each if each.isprintable() else " " for each in str(value))
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(header: Sequence[str], rows: Iterable[Sequence], right: Iterable[int] = ()) -> str:
    """A table of cells that are Markdown already; `right` are the columns with numbers."""
    right = set(right)
    rules = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rules, *rows))


def number(value: int) -> str:
    """A count in full and, where it is large, rounded."""
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if value >= factor:
            return f"{value:,} ({value / factor:.3g} {unit})"
    return f"{value:,}"
