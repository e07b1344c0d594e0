"""Compares evaluations on the same items, from `DIR/<row>/result.json` and `samples.jsonl` of each.

Every difference is second minus first, in percentage points.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from os import PathLike
from pathlib import Path
from statistics import fmean

from ..folders import check_writable
from . import records, statistics
from .results import markdown_table
from .results import marks as marks_of_runs
from .suites import ROWS

KEY = ("task", "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter", "seed")
MOST_RESAMPLES = 1_000_000
ALPHA = 0.05
SHARED_SETTINGS = ("dtype", "batch_size", "seed", "seeds", "max_length", "chat_template")


@dataclass(frozen=True)
class RowComparison:
    """One row, with scores, difference and 95 % interval in per cent.

    `wins` counts the items on which only the second model is better. `p_equivalence` is the p value of the hypothesis
    that the models differ by the margin or more; None without a margin.
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
        """Whether the models are shown to be the same within the margin."""
        return self.p_equivalence is not None and self.p_equivalence < ALPHA


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, compared row by row in the paper's order."""

    first: str
    second: str
    models: tuple[dict, dict]  # hashes and facts of the two models
    rows: list[RowComparison]
    marks: list[str]  # warnings that must be read before any number
    left_out: list[str]  # rows that only one of the evaluations has
    margin: float | None = None


@dataclass(frozen=True)
class Matrix:
    """Every pair of several evaluations on the rows that all have, with Holm's correction over all pairs and rows."""

    folders: list[str]
    pairs: list[Comparison]
    left_out: list[str]


def compare(
    first: str | PathLike,
    second: str | PathLike,
    *,
    bootstrap: int = 10_000,
    seed: int = 0,
    equivalence: float | None = None,
    rows: Sequence[str] | None = None,
) -> Comparison:
    """Compares two evaluations item by item.

    Args:
        first: folder of the evaluation that is subtracted, such as the baseline's.
        second: folder of the other evaluation.
        bootstrap: number of resamples for values other than 0 and 1.
        seed: seed of the resampling.
        equivalence: margin in points, above 0 and below 100, within which the models count as the same.
        rows: rows to compare; by default all that both evaluations have.

    Raises:
        ValueError: no row is shared, a file is corrupt, or a row's items or settings differ.
        OSError: a file is missing or cannot be read.
    """
    folders = Path(first), Path(second)
    if not 100 <= bootstrap <= MOST_RESAMPLES:
        raise ValueError(f"bootstrap must be 100 to {MOST_RESAMPLES} resamples, got {bootstrap}")
    if equivalence is not None and not 0 < equivalence < 100:
        raise ValueError(f"--equivalence must be a margin above 0 and below 100 points, got {equivalence:g}")
    names = [_rows(folder) for folder in folders]
    if folders[0].samefile(folders[1]):
        raise ValueError(f"{second}: the same folder was given twice; name two evaluations")
    shared = [name for name in _ordered(names[0]) if name in names[1] and (rows is None or name in rows)]
    if not shared:
        raise ValueError(f"no row is in both {first} ({_listed(names[0])}) and {second} ({_listed(names[1])})")
    marks: dict[str, None] = {}  # an ordered set
    compared, models = [], None
    for name in shared:
        results = [records.read_result(folder / name) for folder in folders]
        _check_conditions(name, results)
        marks |= dict.fromkeys(_marks(results))
        models = models or tuple(result["model"] for result in results)
        compared.append(_row(name, folders, results, bootstrap, seed, equivalence))
    adjusted = statistics.holm([row.p for row in compared])
    compared = [replace(row, p_holm=p) for row, p in zip(compared, adjusted, strict=True)]
    left_out = [name for name in _ordered({*names[0], *names[1]}) if name not in shared]
    return Comparison(str(folders[0]), str(folders[1]), models, compared, list(marks), left_out, equivalence)


def compare_all(folders: Sequence[str | PathLike], **options) -> Matrix:
    """Compares each of at least two evaluations with every later one; options are those of `compare`."""
    if len(folders) < 2:
        raise ValueError(f"a comparison takes at least two folders, got {len(folders)}")
    names = {str(folder): set(_rows(Path(folder))) for folder in folders}
    shared = set.intersection(*names.values())
    if not shared:
        raise ValueError(f"no row is in all of: {'; '.join(f'{name} ({_listed(own)})' for name, own in names.items())}")
    pairs = [compare(first, second, rows=shared, **options) for first, second in combinations(folders, 2)]
    adjusted = iter(statistics.holm([row.p for pair in pairs for row in pair.rows]))
    pairs = [
        replace(pair, rows=[replace(row, p_holm=next(adjusted)) for row in pair.rows], left_out=[]) for pair in pairs
    ]
    return Matrix([str(folder) for folder in folders], pairs, _ordered(set.union(*names.values()) - shared))


def _rows(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return [path.parent.name for path in folder.glob(f"*/{records.RESULT}")]


def _ordered(names: Iterable[str]) -> list[str]:
    """Sorts rows in the paper's order; rows that the paper does not have come last."""
    order = list(ROWS)
    return sorted(names, key=lambda name: (order.index(name) if name in ROWS else len(order), name))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_ordered(names)) or "no rows"


def _check_conditions(row: str, results: list[dict]):
    """Checks that both sides have the same metric and settings; scores depend on batch size and dtype."""
    first, second = (
        {name: result[name] for name in ("limit", "suite")}
        | {name: result["score"][name] for name in ("metric", "filter", "average")}
        | {name: result["settings"].get(name) for name in SHARED_SETTINGS}
        for result in results
    )
    differing = [f"{name} ({_both(first[name], second[name])})" for name in first if first[name] != second[name]]
    if differing:
        raise ValueError(f"{row}: measured differently, so not compared: {', '.join(differing)}")


def _marks(results: list[dict]) -> list[str]:
    """Returns warnings about conditions that differ without forbidding a comparison."""
    versions = [result["versions"] for result in results]
    packages = [f"{name} {_both(*(each.get(name) for each in versions))}" for name in records.differences(*versions)]
    marks = marks_of_runs(results)
    marks += [f"OTHER PACKAGES, which change scores: {', '.join(packages)}"] * bool(packages)
    found = [sorted(map(str, result.get("batch_sizes_found") or [])) for result in results]
    quantised = [result["model"].get("quantization") or "none" for result in results]
    for what, (one, other) in {
        "DEVICES, which change scores": [str(each["settings"].get("device")).split(":")[0] for each in results],
        "DEVICE MAPS, which change scores": [each["settings"].get("device_map") for each in results],
        "QUANTISATION": quantised,
        f"BATCH SIZES FOUND, which change scores, in {results[0]['row']}": [
            ", ".join(each) or "none" for each in found
        ],
    }.items():
        marks += [f"OTHER {what}: {_both(one, other)}"] * (one != other)
    weights = [result["model"].get("weights") for result in results]
    if weights[0] == weights[1] is not None and quantised[0] == quantised[1]:
        marks.append("THE SAME WEIGHTS on both sides: differences are noise of the machine")
    return marks


def _both(one, other) -> str:
    return f"{str(one)[:60]} and {str(other)[:60]}"


def _row(
    row: str, folders: Sequence[Path], results: list[dict], bootstrap: int, seed: int, margin: float | None
) -> RowComparison:
    score = results[0]["score"]
    before, after = (_values(folder / row, result) for folder, result in zip(folders, results, strict=True))
    if before.keys() != after.keys():
        task, number, *_ = min(before.keys() ^ after.keys(), key=repr)
        raise ValueError(
            f"{row}: not the same items, so not compared: {len(before.keys() - after.keys())} only in {folders[0]}, "
            f"{len(after.keys() - before.keys())} only in {folders[1]}, such as {task} #{number}; an item is known by "
            "its task, number and seed, and by the hashes of its text, prompt and target"
        )
    subtasks, befores, afters = _questions(before, after)
    # If all subtasks have the same number of items, their mean is the mean over items, which has an exact interval.
    macro = score["average"] == "subtasks" and len(set(Counter(subtasks).values())) > 1
    binary = statistics.is_binary(befores, afters)
    resampling = {"resamples": bootstrap, "seed": seed, "macro": macro}
    if binary and not macro:
        test = statistics.mcnemar(befores, afters)
    else:
        test = statistics.paired_bootstrap(befores, afters, subtasks, **resampling)
        if binary:  # the mean over subtasks takes its interval from the bootstrap, and p from the exact test
            exact = statistics.mcnemar(befores, afters)
            test = test._replace(p=exact.p, method=f"{exact.method}; interval: {test.method}")
    p_equivalence = equivalence_method = None
    if margin is not None:
        p_equivalence, equivalence_method = statistics.equivalence(
            befores, afters, margin / 100, subtasks, **resampling
        )
    wins = sum(after > before for before, after in zip(befores, afters, strict=True))
    losses = sum(after < before for before, after in zip(befores, afters, strict=True))
    paper = ROWS[row].paper if row in ROWS else None
    return RowComparison(
        row=row, title=results[0]["title"], metric=score["metric"], filter=score["filter"], average=score["average"],
        items=len(subtasks), first=100 * _mean(befores, subtasks, macro), second=100 * _mean(afters, subtasks, macro),
        difference=100 * test.difference, low=100 * test.low, high=100 * test.high, p=test.p, p_holm=test.p,
        wins=wins, losses=losses, ties=len(subtasks) - wins - losses, method=test.method,
        paper_difference=None if paper is None else round(paper.attnres - paper.baseline, 2),
        prompts_cut=tuple(result["prompts_cut"] for result in results),
        p_equivalence=p_equivalence, equivalence_method=equivalence_method,
    )  # fmt: skip


def _mean(values: Sequence[float], subtasks: Sequence[str], macro: bool) -> float:
    groups = defaultdict(list)
    for value, subtask in zip(values, subtasks, strict=True):
        groups[subtask if macro else None].append(value)
    return fmean(map(fmean, groups.values()))


def _values(folder: Path, result: dict) -> dict[tuple, float]:
    """Reads the values of the printed metric by the items' keys."""
    records.check_samples(folder, result)
    metric, answers = result["score"]["metric"], result["score"]["filter"]
    with (folder / records.SAMPLES).open(encoding="utf-8") as file:
        items = [item for item in map(json.loads, file) if item["filter"] == answers and metric in item["metrics"]]
    return {tuple(item[name] for name in KEY): item["metrics"][metric] for item in items}


def _questions(before: dict[tuple, float], after: dict[tuple, float]) -> tuple[list[str], list[float], list[float]]:
    """Returns subtask, first and second value of every question, averaged over seeds, which are not independent items.

    A question is identified by its task and number, because each order of the choices has another doc_hash.
    """
    seeds = defaultdict(list)
    for key, value in before.items():
        seeds[key[:2]].append((value, after[key]))
    averaged = [tuple(map(fmean, zip(*pairs, strict=True))) for pairs in seeds.values()]
    return [task for task, _ in seeds], [first for first, _ in averaged], [second for _, second in averaged]


def as_markdown(comparison: Comparison, tests: int | None = None) -> str:
    """Returns the table of two evaluations.

    `tests` is the number of tests that p was adjusted for, if that is more than the number of rows.
    """
    margin, rows = comparison.margin, comparison.rows
    table = [
        {
            "Row": row.title, "Items": row.items, "First": f"{row.first:.2f}", "Second": f"{row.second:.2f}",
            "Difference": f"{row.difference:+.2f}", "95 % interval": f"{row.low:+.2f} to {row.high:+.2f}",
            "p": f"{row.p:.2g}", "p (Holm)": f"{row.p_holm:.2g}", "Wins": row.wins, "Losses": row.losses,
            "Paper": "" if row.paper_difference is None else f"{row.paper_difference:+.1f}",
        }
        for row in rows
    ]  # fmt: skip
    lines = [f"> **{mark}**\n" for mark in comparison.marks]
    lines.append(
        f"First: {comparison.first}. Second: {comparison.second}. Differences are second minus first, in points.\n"
    )
    notes = [
        "\nPaper: AttnRes minus baseline after 1.4T tokens, one run each; its sampling error is not published.",
        f"p: two-sided; Holm: adjusted for {tests or len(rows)} tests.",
    ]
    if margin is not None:
        for cells, row in zip(table, rows, strict=True):
            cells[f"Same within {margin:g}"] = f"{'yes' if row.equivalent else 'not shown'}, p {row.p_equivalence:.2g}"
        every = "yes" if all(row.equivalent for row in rows) else "not shown"
        notes.append(
            f"Same within {margin:g} points: two one-sided tests at {100 * ALPHA:g} % each. All rows: {every} "
            "(this needs every row to be the same, so p is not adjusted)."
        )
    lines += [*markdown_table(table), *notes, ""]
    for row in rows:
        same = f"; sameness: {row.equivalence_method}" if row.equivalence_method else ""
        first, second = row.prompts_cut
        cut = f"; prompts cut to the context: {first} and {second}" if first or second else ""
        lines.append(f"- {row.title}: {row.metric}, {row.filter}; {row.method}{same}{cut}")
    if comparison.left_out:
        lines.append(f"\nNot compared, because only one side has them: {', '.join(comparison.left_out)}.")
    return "\n".join([*lines, ""])


def matrix_as_markdown(matrix: Matrix) -> str:
    """Returns the scores of all evaluations, the mean difference of every pair, and each pair's table."""
    names = [f"{second} minus {first}" for first, second in combinations(range(1, len(matrix.folders) + 1), 2)]
    tests = sum(len(pair.rows) for pair in matrix.pairs)
    beside_the_first = matrix.pairs[: len(matrix.folders) - 1]
    scores = [
        {"Row": rows[0].title, "Items": rows[0].items, "1": f"{rows[0].first:.2f}"}
        | {str(number): f"{row.second:.2f}" for number, row in enumerate(rows, 2)}
        for rows in zip(*(pair.rows for pair in beside_the_first), strict=True)
    ]
    means = []
    for name, pair in zip(names, matrix.pairs, strict=True):
        clear = [row.difference for row in pair.rows if row.p_holm < ALPHA]
        cells = {"Difference": name, "Mean": f"{fmean(row.difference for row in pair.rows):+.2f}"}
        cells |= {"Better": sum(each > 0 for each in clear), "Worse": sum(each < 0 for each in clear)}
        means.append(cells | ({"Same": sum(row.equivalent for row in pair.rows)} if pair.margin is not None else {}))
    lines = [f"{number}. {folder}" for number, folder in enumerate(matrix.folders, 1)]
    lines += ["", *markdown_table(scores), ""]
    lines.append(
        f"Mean difference in points, and the rows that are better and worse (p after Holm over {tests} tests below "
        f"{ALPHA:g}) or shown to be the same:\n"
    )
    lines += markdown_table(means)
    if matrix.left_out:
        lines.append(f"\nNot compared, because not all have them: {', '.join(matrix.left_out)}.")
    for name, pair in zip(names, matrix.pairs, strict=True):
        lines += ["", f"## {name}", "", as_markdown(pair, tests)]
    return "\n".join([*lines, ""])


def write(comparison: Comparison | Matrix, out: str | PathLike) -> list[str]:
    """Writes comparison.json, comparison.md and forest.png, and returns the names of the files.

    A matrix has a figure for each evaluation after the first.
    """
    out = Path(out)
    check_writable(out)
    if isinstance(comparison, Comparison):
        text, figures = as_markdown(comparison), {"forest.png": comparison}
    else:
        beside = comparison.pairs[: len(comparison.folders) - 1]
        text = matrix_as_markdown(comparison)
        figures = {f"forest-{number}.png": pair for number, pair in enumerate(beside, 2)}
    records.write_json(out / "comparison.json", asdict(comparison))
    records.write_text(out / "comparison.md", [text])
    for name, pair in figures.items():
        _draw(pair, out / name)
    return ["comparison.json", "comparison.md", *figures]


def _draw(comparison: Comparison, path: Path) -> None:
    from ..plots import forest

    rows = comparison.rows
    forest(
        path, [row.title for row in rows], [row.difference for row in rows], [(row.low, row.high) for row in rows],
        published=[row.paper_difference for row in rows],
        notes=[f"{f'{row.wins} / {row.losses}':<13}  {row.p_holm:.2g}" for row in rows],
        note_title="wins / losses  p (Holm)", title=f"{comparison.second} minus {comparison.first}, on the same items",
        warning="; ".join(comparison.marks),
    )  # fmt: skip
