"""What the study reads and appends to: grids, finished runs, numbers of the command line.

Input that cannot be used raises a `ValueError` with a message of one line.
"""

import argparse
import json
from collections.abc import Callable, Collection
from pathlib import Path

import yaml

from attnres.messages import one_line

MOST = 10**9  # no number of a grid comes near it


def is_whole(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < MOST


def is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MOST


ANYTHING = ("anything", lambda value: True)  # what the package itself checks
WHOLE = ("a whole number of at least 1", is_whole)
SEED = ("a whole number of at least 0", lambda value: is_whole(value, 0))
POSITIVE = ("a positive number", is_positive)
LENGTH = ("a whole number of at least 2", lambda value: is_whole(value, 2))


def check(values: dict, rules: dict[str, tuple[str, Callable]], place: str, optional: Collection[str] = ()):
    """Refuses a mapping that lacks a field of `rules`, has another, or a value against its rule."""
    if not isinstance(values, dict):
        raise ValueError(f"{place} must be a mapping, got {values!r}")
    for name in [*values, *rules]:
        if name not in rules:
            raise ValueError(f"{place} has an unknown field {name!r}; the fields are {', '.join(rules)}")
        if name not in values and name not in optional:
            raise ValueError(f"{place} lacks {name}")
    for name, value in values.items():
        rule, holds = rules[name]
        if not holds(value):
            raise ValueError(f"{name} of {place} must be {rule}, got {value!r}")


def each_of(rule: tuple[str, Callable]) -> tuple[str, Callable]:
    """The rule of a list without repetitions that has at least one entry."""

    def holds(values) -> bool:
        return (
            isinstance(values, list) and bool(values) and all(map(rule[1], values)) and len(set(values)) == len(values)
        )

    return f"a list of different entries, each {rule[0]}", holds


def one_of(names: Collection[str]) -> tuple[str, Callable]:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


MAPPING = (
    "a mapping from names, with at least one entry",
    lambda value: isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value),
)
STAGES = ("a list of stages", lambda value: isinstance(value, list) and bool(value))


def read_yaml(path: Path):
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {one_line(error)}") from None


def read_results(path: Path, fields: Collection[str] = ()) -> list[dict]:
    """The JSON lines of a file, all of which have some fields; none if there is no such file."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    results = []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {path} is not valid JSON ({error}); delete it to run it again"
            ) from None
        if result is not None and not isinstance(result, dict):
            raise ValueError(f"line {number} of {path} is not a run: {line[:60]!r}; delete it")
        if result:
            if missing := [name for name in fields if name not in result]:
                raise ValueError(f"line {number} of {path} is not a run of this study: it lacks {missing[0]}")
            results.append(result)
    return results


def append(path: Path, result: dict):
    """Adds a line to a file of results, also after a last line without an end."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(result).encode() + b"\n")


def check_folder_of(path: Path):
    """Refuses an output path whose folder does not exist, before the work that would be lost."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder; make it first")


def whole(text: str) -> int:
    """A number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be {WHOLE[0]}, got {text}")
    return int(text)


def positive(text: str) -> float:
    """A number of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be {POSITIVE[0]}, got {text}")
    return value
