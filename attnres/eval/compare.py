"""Compares evaluations on the same items: `DIR/<row>/result.json` and `samples.jsonl` of each.

Every difference is second minus first, in per cent points.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from os import PathLike
from pathlib import Path
from statistics import fmean

from . import records, statistics
from .published import TABLE_3
from .results import LIMITED, SAMPLE

KEY = ("task", "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")
SHOWN = 3  # examples in an error
SAMPLE_FIELDS = {
    **dict.fromkeys(("task", "doc_hash", "prompt_hash", "target_hash", "filter"), str),
    "doc_id": int, "seed": (int, None), "metrics": dict,
}  # fmt: skip
MOST_RESAMPLES = 1_000_000
ALPHA = 0.05
SHARED_SETTINGS = ("dtype", "batch_size", "seed", "seeds", "max_length", "chat_template")


@dataclass(frozen=True)
class RowComparison:
    """One row. Scores, difference and interval in per cent; wins are items on which only the second model is better.

    `p_equivalence` is that of the hypothesis that the models differ by the margin or more; None without a margin.
    """

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
    prompts_cut: tuple[int, int]
    p_equivalence: float | None
    equivalence_method: str | None

    @property
    def equivalent(self) -> bool:
        return self.p_equivalence is not None and self.p_equivalence < ALPHA


@dataclass(frozen=True)
class Comparison:
    """Rows in the paper's order; `marks` must be read before any number; `left_out` are rows that one side lacks.

    `models` are what the two sides' first rows say of their model: hashes, parameters, device.
    """

    first: str
    second: str
    models: tuple[dict, dict]
    rows: list[RowComparison]
    marks: list[str]
    left_out: list[str]
    margin: float | None = None

    @property
    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Matrix:
    """Every pair of several evaluations, on the rows that all have; Holm's correction is over all pairs and rows."""

    folders: list[str]
    pairs: list[Comparison]
    left_out: list[str]

    @property
    def as_dict(self) -> dict:
        return asdict(self)


def compare(
    first: str | PathLike,
    second: str | PathLike,
    *,
    bootstrap: int = 10_000,
    seed: int = 0,
    equivalence: float | None = None,
    rows: Sequence[str] | None = None,
) -> Comparison:
    """Pairs two evaluations item by item.

    Args:
        first: folder of the evaluation that is subtracted, such as the baseline's.
        second: folder of the other one.
        bootstrap: resamples where values are not 0 and 1.
        seed: of the resampling.
        equivalence: margin in points, above 0 and below 100, within which the models count as the same.
        rows: only these; by default all that both have.

    Raises:
        ValueError: nothing to compare, a file is corrupt, or the items of a row are not the same.
        OSError: a file is missing or cannot be read.
    """
    first, second = Path(first), Path(second)
    if not 100 <= bootstrap <= MOST_RESAMPLES:
        raise ValueError(f"bootstrap must be 100 to {MOST_RESAMPLES} resamples, got {bootstrap}")
    if equivalence is not None and not 0 < equivalence < 100:
        raise ValueError(f"--equivalence must be a margin above 0 and below 100 points, got {equivalence:g}")
    names = [_rows(folder) for folder in (first, second)]
    if first.samefile(second):
        raise ValueError(f"{second}: the same folder was given twice; name two evaluations")
    shared = [name for name in _ordered(names[0]) if name in names[1] and (rows is None or name in rows)]
    if not shared:
        raise ValueError(f"no row is in both {first} ({_listed(names[0])}) and {second} ({_listed(names[1])})")
    marks, measured, models = [], [], []
    for name in shared:
        results = [_result(folder / name) for folder in (first, second)]
        _agree(name, results)
        marks += [LIMITED] * any(result["limit"] is not None for result in results)
        marks += [SAMPLE] * any(result["suite"] == "sample" for result in results)
        marks += _differing_conditions(results)
        models = models or [result["model"] for result in results]
        measured.append(_row(name, first, second, results, bootstrap, seed, equivalence))
    adjusted = statistics.holm([row["p"] for row in measured])
    compared = [RowComparison(**row, p_holm=p) for row, p in zip(measured, adjusted, strict=True)]
    left_out = [name for name in _ordered({*names[0], *names[1]}) if name not in shared]
    marks = list(dict.fromkeys(marks))
    return Comparison(str(first), str(second), tuple(models), compared, marks, left_out, equivalence)


def compare_all(folders: Sequence[str | PathLike], **options) -> Matrix:
    """Compares every evaluation with every later one; options are those of `compare`.

    Raises:
        ValueError: as `compare`, or there are fewer than two folders.
        OSError: likewise.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison takes at least two folders, got {len(folders)}")
    names = {str(folder): set(_rows(Path(folder))) for folder in folders}
    shared = set.intersection(*names.values())
    if not shared:
        raise ValueError(f"no row is in all of: {'; '.join(f'{name} ({_listed(own)})' for name, own in names.items())}")
    pairs = [compare(first, second, rows=shared, **options) for first, second in combinations(folders, 2)]
    adjusted = iter(statistics.holm([row.p for pair in pairs for row in pair.rows]))
    pairs = [replace(pair, rows=[replace(row, p_holm=next(adjusted)) for row in pair.rows]) for pair in pairs]
    left_out = _ordered(set.union(*names.values()) - shared)
    return Matrix([str(folder) for folder in folders], [replace(pair, left_out=[]) for pair in pairs], left_out)


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
    return result


def _agree(row: str, results: list[dict]):
    """The same measure under the same settings; scores move with batch size and dtype."""
    what = {"limit": [result["limit"] for result in results], "suite": [result["suite"] for result in results]}
    for name in ("metric", "filter", "average"):
        what[name] = [result["score"][name] for result in results]
    for name in SHARED_SETTINGS:
        what[name] = [result["settings"].get(name) for result in results]
    differing = [f"{name} ({_short(one)} and {_short(other)})" for name, (one, other) in what.items() if one != other]
    if differing:
        raise ValueError(f"{row}: measured differently, so not compared: {', '.join(differing)}")


def _differing_conditions(results: list[dict]) -> list[str]:
    """What does not forbid a comparison but must be known before it is believed."""
    first, second = results
    marks = []
    packages = records.differences(first["versions"], second["versions"])
    if packages:
        both = (
            f"{name} {_short(first['versions'].get(name))} and {_short(second['versions'].get(name))}"
            for name in packages
        )
        marks.append(f"OTHER PACKAGES, which move scores: {', '.join(both)}")
    for name, what in (("device", "DEVICES"), ("device_map", "DEVICE MAPS")):
        one, other = (str(result["settings"].get(name)).split(":")[0] for result in results)
        if one != other:
            marks.append(f"OTHER {what}, which move scores: {_short(one)} and {_short(other)}")
    quantised = [_short(result["model"].get("quantization") or "none") for result in results]
    if quantised[0] != quantised[1]:
        marks.append(f"OTHER QUANTISATION: {quantised[0]} and {quantised[1]}")
    found = [sorted(map(str, result.get("batch_sizes_found") or [])) for result in results]
    if found[0] != found[1]:
        sizes = " and ".join(_short(", ".join(each) or "none") for each in found)
        marks.append(f"OTHER BATCH SIZES FOUND, which move scores: {first['row']} {sizes}")
    weights = [result["model"].get("weights") for result in results]
    if weights[0] == weights[1] is not None and quantised[0] == quantised[1]:
        marks.append("THE SAME WEIGHTS on both sides: differences are noise of the machine")
    return marks


def _short(value) -> str:
    return str(value)[:60]


def _row(
    row: str, first: Path, second: Path, results: list[dict], bootstrap: int, seed: int, margin: float | None
) -> dict:
    score = results[0]["score"]
    sides = [_values(folder / row / records.SAMPLES, score["metric"], score["filter"]) for folder in (first, second)]
    for folder, result in zip((first, second), results, strict=True):
        records.check_samples(folder / row, result)
    _same_items(row, first, second, *(set(side) for side in sides))
    pairs = _questions(*sides)
    subtasks = [subtask for subtask, *_ in pairs]
    befores, afters = ([pair[side] for pair in pairs] for side in (1, 2))
    # With as many items in each subtask the mean over subtasks is the one over items, which has exact intervals.
    macro = score["average"] == "subtasks" and len(set(Counter(subtasks).values())) > 1
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
    same = (None, None)
    if margin is not None:
        same = statistics.equivalence(befores, afters, margin / 100, subtasks, **resampling)
    wins = sum(after > before for _, before, after in pairs)
    losses = sum(after < before for _, before, after in pairs)
    paper = TABLE_3.get(row)
    return {
        "row": row,
        "title": results[0]["title"],
        "metric": score["metric"],
        "filter": score["filter"],
        "average": score["average"],
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
        "p_equivalence": same[0],
        "equivalence_method": same[1],
        "prompts_cut": tuple(result["prompts_cut"] for result in results),
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
    # In bytes: only \n ends a line there, and text may hold other separators.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number} is no sample"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} ({error})") from None
            if not isinstance(item, dict):
                raise ValueError(f"{where}, but {type(item).__name__}")
            records.check_fields(item, SAMPLE_FIELDS, where)
            if item["filter"] != filter_name or metric not in item["metrics"]:
                continue
            key = (*(item[name] for name in KEY), item["seed"])
            value = item["metrics"][metric]
            if type(value) not in records.NUMBER or not 0 <= value <= 1:
                raise ValueError(
                    f"{path}: line {number}: {metric} must be a number from 0 to 1, got {repr(value)[:60]}"
                )
            if key in found:
                raise ValueError(f"{path}: line {number} repeats an item")
            found[key] = ((item["task"], item["doc_id"]), item["task"], float(value))
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
    """(subtask, value, value) per question, its seeds averaged: they are not independent items.

    Each order of the choices has a doc_hash of its own, so that a question is known by its number.
    """
    grouped: dict[tuple, list] = {}
    for key, (question, subtask, value) in before.items():
        grouped.setdefault(question, []).append((subtask, value, after[key][2]))
    return [
        (seeds[0][0], fmean(value for _, value, _ in seeds), fmean(value for *_, value in seeds))
        for seeds in grouped.values()
    ]


def as_markdown(comparison: Comparison, tests: int | None = None) -> str:
    """The table as readable text.

    Args:
        tests: rows over which p was adjusted, where they are more than those of the table.
    """
    margin = comparison.margin
    titles = ["Row", "Items", "First", "Second", "Difference", "95 % interval", "p", "p (Holm)", "Wins", "Losses"]
    titles += ["Paper"] if margin is None else ["Paper", f"Same within {margin:g}"]
    lines = [f"> **{mark}**\n" for mark in comparison.marks]
    lines += [
        f"First: {comparison.first}. Second: {comparison.second}. Differences are second minus first, in points.\n",
        f"| {' | '.join(titles)} |",
        f"|---{'|---:' * (len(titles) - 1)}|",
    ]
    for row in comparison.rows:
        paper = "" if row.paper_difference is None else f"{row.paper_difference:+.1f}"
        same = "" if margin is None else f" {'yes' if row.equivalent else 'not shown'}, p {row.p_equivalence:.2g} |"
        lines.append(
            f"| {row.title} | {row.items} | {row.first:.2f} | {row.second:.2f} | {row.difference:+.2f} "
            f"| {row.low:+.2f} to {row.high:+.2f} | {row.p:.2g} | {row.p_holm:.2g} "
            f"| {row.wins} | {row.losses} | {paper} |{same}"
        )
    lines.append(
        "\nPaper: AttnRes minus baseline after 1.4T tokens, one run each; its sampling error is not published."
    )
    lines.append(f"p: two-sided; Holm: adjusted for {tests or len(comparison.rows)} tests.")
    if margin is not None:
        every = all(row.equivalent for row in comparison.rows)
        lines.append(
            f"Same within {margin:g} points: two one-sided tests at {100 * ALPHA:g} % each. All rows: "
            f"{'yes' if every else 'not shown'} (which needs every row, so nothing is adjusted)."
        )
    lines.append("")
    for row in comparison.rows:
        same = f"; sameness: {row.equivalence_method}" if row.equivalence_method else ""
        lines.append(f"- {row.title}: {row.metric}, {row.filter}; {row.method}{same}{_cut(row)}")
    if comparison.left_out:
        lines.append(f"\nNot compared, only one side has them: {', '.join(comparison.left_out)}.")
    return "\n".join([*lines, ""])


def matrix_as_markdown(matrix: Matrix) -> str:
    """Scores of all, differences of every pair, then each pair's table."""
    count = len(matrix.folders)
    pairs = dict(zip(combinations(range(count), 2), matrix.pairs, strict=True))
    tests = sum(len(pair.rows) for pair in matrix.pairs)
    same = ", and after = those shown to be the same" if matrix.pairs[0].margin is not None else ""
    heads = " | ".join(str(number) for number in range(1, count + 1))
    lines = [f"{number}. {folder}" for number, folder in enumerate(matrix.folders, 1)]
    lines += ["", f"| Row | Items | {heads} |", f"|---{'|---:' * (count + 1)}|"]
    for place, row in enumerate(matrix.pairs[0].rows):
        scores = [row.first] + [pairs[0, other].rows[place].second for other in range(1, count)]
        lines.append(f"| {row.title} | {row.items} | {' | '.join(f'{score:.2f}' for score in scores)} |")
    lines += [
        "",
        "Mean difference over the rows in points, column minus line; in brackets the rows on which the column is "
        f"better and worse (p after Holm over {tests} tests below {ALPHA:g}){same}:\n",
        f"| | {heads} |",
        f"|---{'|---:' * count}|",
    ]
    for line in range(count):
        cells = [_cell(pairs, line, column) for column in range(count)]
        lines.append(f"| {line + 1} | {' | '.join(cells)} |")
    if matrix.left_out:
        lines.append(f"\nNot compared, not all have them: {', '.join(matrix.left_out)}.")
    for (first, second), pair in pairs.items():
        lines += ["", f"## {second + 1} minus {first + 1}", "", as_markdown(pair, tests)]
    return "\n".join([*lines, ""])


def _cell(pairs: dict[tuple[int, int], Comparison], line: int, column: int) -> str:
    if line == column:
        return ""
    pair, sign = (pairs[line, column], 1) if line < column else (pairs[column, line], -1)
    clear = [sign * row.difference for row in pair.rows if row.p_holm < ALPHA]
    same = f" ={sum(row.equivalent for row in pair.rows)}" if pair.margin is not None else ""
    mean = sign * fmean(row.difference for row in pair.rows) + 0.0  # no minus zero
    return f"{mean:+.2f} (+{sum(each > 0 for each in clear)} -{sum(each < 0 for each in clear)}{same})"


def _cut(row: RowComparison) -> str:
    first, second = row.prompts_cut
    return f"; prompts cut to the context: {first} and {second}" if first or second else ""


def write(comparison: Comparison | Matrix, out: str | PathLike) -> list[str]:
    """Writes comparison.json, comparison.md and forest.png; of several evaluations, a figure of each beside the first.

    Returns:
        the names of the files.

    Raises:
        OSError: the folder cannot be written.
    """
    out = Path(out)
    try:
        records.write_json(out / "comparison.json", comparison.as_dict)
        if isinstance(comparison, Comparison):
            figures = {"forest.png": comparison}
            records.write_text(out / "comparison.md", [as_markdown(comparison)])
        else:
            beside = comparison.pairs[: len(comparison.folders) - 1]
            figures = {f"forest-{number}.png": pair for number, pair in enumerate(beside, 2)}
            records.write_text(out / "comparison.md", [matrix_as_markdown(comparison)])
        for name, pair in figures.items():
            _draw(pair, out / name)
    except OSError as error:
        raise OSError(f"{out}: cannot write the comparison there, {error.strerror or error}") from None
    return ["comparison.json", "comparison.md", *figures]


def _draw(comparison: Comparison, path: Path) -> None:
    from ..plots import forest

    rows = comparison.rows
    forest(
        path,
        [row.title for row in rows],
        [row.difference for row in rows],
        [(row.low, row.high) for row in rows],
        published=[row.paper_difference for row in rows],
        notes=[f"{f'{row.wins} / {row.losses}':<13}  {row.p_holm:.2g}" for row in rows],
        note_title="wins / losses  p (Holm)",
        title=f"{comparison.second} minus {comparison.first}, on the same items",
        warning="; ".join(comparison.marks),
    )


def _listed(names: list[str]) -> str:
    return ", ".join(_ordered(names)) or "no rows"
