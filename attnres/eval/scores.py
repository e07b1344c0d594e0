"""From lm-eval's items to a row's numbers: micro and macro averages with standard errors, in per cent."""

from collections import defaultdict
from collections.abc import Iterable
from math import isnan, sqrt
from statistics import fmean, variance

from .suites import Row


def row_scores(row: Row, items: list[dict]) -> tuple[dict, list[dict]]:
    """The printed score of a row, and its secondary ones.

    Args:
        items: samples as they are written to samples.jsonl.
    """
    primary, *others = [
        _score(metric, filter_name, items, row) for metric, filter_name in ((row.metric, row.filter), *row.secondary)
    ]
    return primary, others


def task_scores(items: list[dict]) -> dict[str, dict]:
    """Mean, standard error and number of items per leaf task, "metric,filter" by "metric,filter"."""
    pairs = sorted({(item["filter"], metric) for item in items for metric in item["metrics"]})
    tasks: dict[str, dict] = defaultdict(dict)
    for filter_name, metric in pairs:
        for task, values in _by_task(items, metric, filter_name).items():
            mean, error = _mean(values)
            tasks[task][f"{metric},{filter_name}"] = {"value": mean, "stderr": error, "n": len(values)}
    return dict(tasks)


def _score(metric: str, filter_name: str, items: list[dict], row: Row) -> dict:
    tasks = _by_task(items, metric, filter_name)
    if not tasks:
        raise ValueError(f"{row.name}: no item has {metric} after the filter {filter_name}")
    parts = [(*_mean(values), len(values)) for values in tasks.values()]
    total = sum(n for *_, n in parts)
    micro = sum(mean * n for mean, _, n in parts) / total
    macro = fmean(mean for mean, *_ in parts)
    errors = [(error, n) for _, error, n in parts]
    # A stratum of one item tells nothing of its spread: then the error is that of all items together.
    if any(error is None for error, _ in errors):
        micro_error = macro_error = _mean([value for values in tasks.values() for value in values])[1]
    else:
        micro_error = sqrt(sum((error * n) ** 2 for error, n in errors)) / total
        macro_error = sqrt(sum(error**2 for error, _ in errors)) / len(errors)
    micros = {"value": micro, "stderr": micro_error}
    macros = {"value": macro, "stderr": macro_error}
    chosen = macros if row.average == "subtasks" else micros
    return {
        "metric": metric, "filter": filter_name, **chosen, "n": total, "average": row.average,
        "micro": micros, "macro": macros, "subtasks": len(tasks),
    }  # fmt: skip


def _by_task(items: Iterable[dict], metric: str, filter_name: str) -> dict[str, list[float]]:
    """Values in per cent per task, the seeds of a question averaged first: they are not independent items."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item["filter"] == filter_name and metric in item["metrics"]:
            values[item["task"]][item["doc_id"]].append(100 * item["metrics"][metric])
    return {task: [fmean(seeds) for seeds in questions.values()] for task, questions in values.items()}


def _mean(values: list[float]) -> tuple[float, float | None]:
    mean = fmean(values)
    if isnan(mean):
        raise ValueError("a metric is NaN")
    return mean, sqrt(variance(values) / len(values)) if len(values) > 1 else None
