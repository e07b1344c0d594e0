"""Computes a row's numbers from lm-eval's items: micro and macro averages with standard errors, in per cent."""

from collections import defaultdict
from math import isnan, sqrt
from statistics import fmean, variance

from .suites import Row


def row_scores(row: Row, items: list[dict]) -> tuple[dict, list[dict]]:
    """Returns the printed score of a row and its secondary ones, from the items of its samples.jsonl."""
    primary, *others = [_score(row, items, *pair) for pair in ((row.metric, row.filter), *row.secondary)]
    return primary, others


def task_scores(items: list[dict]) -> dict[str, dict]:
    """Returns mean, standard error and number of items for each leaf task and each "metric,filter"."""
    pairs = sorted({(item["filter"], metric) for item in items for metric in item["metrics"]})
    tasks: dict[str, dict] = defaultdict(dict)
    for filter_name, metric in pairs:
        for task, values in _by_task(items, metric, filter_name).items():
            mean, error = _mean(values)
            tasks[task][f"{metric},{filter_name}"] = {"value": mean, "stderr": error, "n": len(values)}
    return dict(tasks)


def _score(row: Row, items: list[dict], metric: str, filter_name: str) -> dict:
    tasks = list(_by_task(items, metric, filter_name).values())
    if not tasks:
        raise ValueError(f"{row.name}: no item has {metric} after the filter {filter_name}")
    means, errors = zip(*map(_mean, tasks), strict=True)
    counts = list(map(len, tasks))
    total = sum(counts)
    if None in errors:
        # A task of one item says nothing about the spread: the error is that of all items together.
        micro_error = macro_error = _mean([value for values in tasks for value in values])[1]
    else:
        micro_error = sqrt(sum((error * n) ** 2 for error, n in zip(errors, counts, strict=True))) / total
        macro_error = sqrt(sum(error**2 for error in errors)) / len(errors)
    micro = {"value": sum(mean * n for mean, n in zip(means, counts, strict=True)) / total, "stderr": micro_error}
    macro = {"value": fmean(means), "stderr": macro_error}
    chosen = macro if row.average == "subtasks" else micro
    return {
        "metric": metric, "filter": filter_name, **chosen, "n": total, "average": row.average,
        "micro": micro, "macro": macro, "subtasks": len(tasks),
    }  # fmt: skip


def _by_task(items: list[dict], metric: str, filter_name: str) -> dict[str, list[float]]:
    """Returns the values of each task in per cent, one per question.

    The seeds of a question are averaged first, because they are not independent items.
    """
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item["filter"] == filter_name and metric in item["metrics"]:
            values[item["task"]][item["doc_id"]].append(100 * item["metrics"][metric])
    return {task: [fmean(seeds) for seeds in questions.values()] for task, questions in values.items()}


def _mean(values: list[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, which is None for a single value."""
    mean = fmean(values)
    if isnan(mean):
        raise ValueError("a metric is NaN")
    return mean, sqrt(variance(values) / len(values)) if len(values) > 1 else None
