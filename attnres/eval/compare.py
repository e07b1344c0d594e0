"""Two evaluations compared on the same items: `DIR/<row>/result.json` and `samples.jsonl` of each.

Every difference is second minus first, in per cent points.
"""

import json
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import fmean

from . import records, statistics
from .published import TABLE_3
from .results import LIMITED, SAMPLE

KEY = ("task", "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")
SHOWN = 3  # examples in an error
SHARED_SETTINGS = ("dtype", "batch_size", "seed", "seeds", "max_length", "chat_template")


@dataclass(frozen=True)
class RowComparison:
    """One row. Scores, difference and interval in per cent; wins are items on which only the second model is better."""

    row: str
    title: str
    metric: str
    filter: str
    average: str
    items: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    wins: int
    losses: int
    ties: int
    method: str
    paper_difference: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows in the paper's order; `marks` must be read before any number; `left_out` are rows that one side lacks."""

    first: str
    second: str
    rows: list[RowComparison]
    marks: list[str]
    left_out: list[str]

    @property
    def as_dict(self) -> dict:
        return asdict(self)


def compare(first: str | PathLike, second: str | PathLike, *, bootstrap: int = 10_000, seed: int = 0) -> Comparison:
    """Pairs two evaluations item by item.

    Args:
        first: folder of the evaluation that is subtracted, such as the baseline's.
        second: folder of the other one.
        bootstrap: resamples where values are not 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: nothing to compare, a file is corrupt, or the items of a row are not the same.
        OSError: a file is missing or cannot be read.
    """
    first, second = Path(first), Path(second)
    if bootstrap < 100:
        raise ValueError(f"bootstrap must be at least 100 resamples, got {bootstrap}")
    names = [_rows(folder) for folder in (first, second)]
    shared = [name for name in _ordered(names[0]) if name in names[1]]
    if not shared:
        raise ValueError(f"no row is in both {first} ({_listed(names[0])}) and {second} ({_listed(names[1])})")
    marks, measured = [], []
    for name in shared:
        results = [_result(folder / name) for folder in (first, second)]
        _agree(name, results)
        marks += [LIMITED] * any(result["limit"] is not None for result in results)
        marks += [SAMPLE] * any(result["suite"] == "sample" for result in results)
        measured.append(_row(name, first, second, results, bootstrap, seed))
    adjusted = statistics.holm([row["p"] for row in measured])
    rows = [RowComparison(**row, p_holm=p) for row, p in zip(measured, adjusted, strict=True)]
    left_out = [name for name in _ordered({*names[0], *names[1]}) if name not in shared]
    return Comparison(str(first), str(second), rows, list(dict.fromkeys(marks)), left_out)


def _rows(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return [path.parent.name for path in folder.glob(f"*/{records.RESULT}")]


def _ordered(names) -> list[str]:
    """The paper's order; rows that it does not have come last."""
    order = list(TABLE_3)
    return sorted(names, key=lambda name: (order.index(name) if name in TABLE_3 else len(order), name))


def _result(folder: Path) -> dict:
    result = records.read_result(folder)
    if result is None:
        raise ValueError(f"{folder / records.RESULT}: is missing")
    score = result["score"]
    if not isinstance(score, dict) or not {"metric", "filter"} <= set(score):
        raise ValueError(f"{folder / records.RESULT}: not a result, its score lacks metric or filter")
    return result


def _agree(row: str, results: list[dict]):
    """The same measure under the same settings; scores move with batch size and dtype."""
    first, second = results
    what = {"limit": [result["limit"] for result in results], "suite": [result["suite"] for result in results]}
    for name in ("metric", "filter", "average"):
        what[name] = [result["score"].get(name) for result in results]
    for name in SHARED_SETTINGS:
        what[name] = [result.get("settings", {}).get(name) for result in (first, second)]
    differing = [f"{name} ({values[0]} and {values[1]})" for name, values in what.items() if values[0] != values[1]]
    if differing:
        raise ValueError(f"{row}: measured differently, so not compared: {', '.join(differing)}")


def _row(row: str, first: Path, second: Path, results: list[dict], bootstrap: int, seed: int) -> dict:
    score = results[0]["score"]
    sides = [_values(folder / row / records.SAMPLES, score["metric"], score["filter"]) for folder in (first, second)]
    _same_items(row, first, second, *(set(side) for side in sides))
    pairs = _questions(*sides)
    subtasks = [subtask for subtask, *_ in pairs]
    befores, afters = ([pair[side] for pair in pairs] for side in (1, 2))
    macro = score.get("average") == "subtasks"
    binary = statistics.is_binary(befores) and statistics.is_binary(afters)
    resampling = {"resamples": bootstrap, "seed": seed, "macro": macro}
    if binary and not macro:
        test = statistics.mcnemar(befores, afters)
    else:
        test = statistics.paired_bootstrap(befores, afters, subtasks, **resampling)
        if binary:  # the mean over subtasks takes its interval from the bootstrap, its p from the exact test
            test = test._replace(
                p=statistics.mcnemar(befores, afters).p, method=f"exact McNemar; interval: {test.method}"
            )
    wins = sum(after > before for _, before, after in pairs)
    losses = sum(after < before for _, before, after in pairs)
    paper = TABLE_3.get(row)
    return {
        "row": row,
        "title": results[0].get("title", row),
        "metric": score["metric"],
        "filter": score["filter"],
        "average": score.get("average", "items"),
        "items": len(pairs),
        "first": 100 * _mean(befores, subtasks, macro),
        "second": 100 * _mean(afters, subtasks, macro),
        "difference": 100 * test.difference,
        "low": 100 * test.low,
        "high": 100 * test.high,
        "p": test.p,
        "wins": wins,
        "losses": losses,
        "ties": len(pairs) - wins - losses,
        "method": test.method,
        "paper_difference": None if paper is None else round(paper.attnres - paper.baseline, 2),
    }


def _mean(values: list[float], subtasks: list[str], macro: bool) -> float:
    if not macro:
        return fmean(values)
    return fmean(
        fmean(value for value, name in zip(values, subtasks, strict=True) if name == subtask)
        for subtask in set(subtasks)
    )


def _values(path: Path, metric: str, filter_name: str) -> dict[tuple, tuple[tuple, str, float]]:
    """Per key: the question it belongs to, its subtask, its value."""
    found: dict[tuple, tuple[tuple, str, float]] = {}
    # Not splitlines: answers may hold other line separators than \n.
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
                if item["filter"] != filter_name or metric not in item["metrics"]:
                    continue
                key = (*(item[name] for name in KEY), item.get("seed"))
                value = float(item["metrics"][metric])
                entry = (
                    (item["task"], item["doc_id"]),
                    str(item.get("subtask") or item["task"]),
                    value,
                )
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{path}: line {number} is no sample ({what})") from None
            if key in found:
                raise ValueError(f"{path}: line {number} repeats an item")
            found[key] = entry
    if not found:
        raise ValueError(f"{path}: no sample has {metric} after the filter {filter_name}")
    return found


def _same_items(row: str, first: Path, second: Path, before: set, after: set):
    if before == after:
        return
    parts = []
    for folder, only in ((first, before - after), (second, after - before)):
        if only:
            shown = ", ".join(f"{key[0]} #{key[1]}" for key in sorted(only, key=repr)[:SHOWN])
            parts.append(f"{len(only)} only in {folder} ({shown}{', ...' if len(only) > SHOWN else ''})")
    questions = [{key[:2] for key in keys} for keys in (before, after)]
    reason = " (the same questions, but their text, prompt or target differs)" if questions[0] == questions[1] else ""
    raise ValueError(f"{row}: not the same items, so not compared: {'; '.join(parts)}{reason}")


def _questions(before: dict, after: dict) -> list[tuple[str, float, float]]:
    """(subtask, value, value) per question, its seeds averaged: they are no independent items.

    Each order of the choices has a doc_hash of its own, so that a question is known by its number.
    """
    grouped: dict[tuple, list] = {}
    for key, (question, subtask, value) in before.items():
        grouped.setdefault(question, []).append((subtask, value, after[key][2]))
    return [
        (seeds[0][0], fmean(value for _, value, _ in seeds), fmean(value for *_, value in seeds))
        for seeds in grouped.values()
    ]


def as_markdown(comparison: Comparison) -> str:
    """The table for people."""
    lines = [f"> **{mark}**\n" for mark in comparison.marks]
    lines += [
        f"First: {comparison.first}. Second: {comparison.second}. Differences are second minus first, in points.\n",
        "| Row | Items | First | Second | Difference | 95 % interval | p | p (Holm) | Wins | Losses | Paper |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in comparison.rows:
        paper = "" if row.paper_difference is None else f"{row.paper_difference:+.1f}"
        lines.append(
            f"| {row.title} | {row.items} | {row.first:.2f} | {row.second:.2f} | {row.difference:+.2f} "
            f"| {row.low:+.2f} to {row.high:+.2f} | {row.p:.2g} | {row.p_holm:.2g} "
            f"| {row.wins} | {row.losses} | {paper} |"
        )
    lines.append(
        "\nPaper: AttnRes minus baseline after 1.4T tokens, one run each; its sampling error is not published."
    )
    lines.append("p: two-sided; Holm: adjusted for the number of rows.")
    lines += [f"- {row.title}: {row.metric}, {row.filter}; {row.method}" for row in comparison.rows]
    if comparison.left_out:
        lines.append(f"\nNot compared, only one side has them: {', '.join(comparison.left_out)}.")
    return "\n".join([*lines, ""])


def write(comparison: Comparison, out: str | PathLike) -> None:
    """Writes comparison.json, comparison.md and forest.png."""
    from ..plots import forest

    out = Path(out)
    records.write_json(out / "comparison.json", comparison.as_dict)
    records.write_text(out / "comparison.md", [as_markdown(comparison)])
    rows = comparison.rows
    forest(
        out / "forest.png",
        [row.title for row in rows],
        [row.difference for row in rows],
        [(row.low, row.high) for row in rows],
        published=[row.paper_difference for row in rows],
        notes=[f"{row.wins} / {row.losses}   {row.p_holm:.2g}" for row in rows],
        note_title="wins / losses   p (Holm)",
        title="Second minus first on the same items",
        warning="; ".join(comparison.marks),
    )


def _listed(names: list[str]) -> str:
    return ", ".join(_ordered(names)) or "no rows"
