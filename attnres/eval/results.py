"""The table over finished rows, as Markdown, CSV and JSON."""

import csv
import io
from pathlib import Path

from . import records
from .published import TABLE_3
from .suites import ROWS

LIMITED = "LIMITED RUN: only some items of each task; not a result of the benchmark"
SAMPLE = "SAMPLE ITEMS: miniature questions of our own; says whether everything works, nothing about the benchmarks"
COLUMNS = (
    "row", "title", "measured", "stderr", "n", "shots", "metric", "filter", "average", "micro", "micro_stderr", "macro",
    "macro_stderr", "paper_baseline", "paper_attnres", "minus_baseline", "minus_attnres", "limit", "suite",
    "prompts_cut", "answers_short", "wall_seconds", "tokens_per_second", "seeds",
)  # fmt: skip


def write_tables(out: Path, identity: dict, failed: dict | None = None, skipped: dict | None = None) -> None:
    """Writes results.md, .csv and .json over the rows in `out` that were measured on one model."""
    results, left_out = _finished(out, identity)
    table = {
        "marks": marks(results),
        "rows": [table_row(result) for result in results],
        "failed": failed or {},
        "skipped": skipped or {},
        "of_other_models": left_out,
        "model": results[0]["model"] if results else identity,
        "versions": {result["row"]: result["versions"] for result in results},
        "settings": {result["row"]: result["settings"] for result in results},
        "protocol": {result["row"]: result["protocol"] for result in results},
    }
    records.write_json(out / "results.json", table)
    records.write_text(out / "results.csv", [as_csv(table)])
    records.write_text(out / "results.md", [as_markdown(table)])


def _finished(out: Path, identity: dict) -> tuple[list[dict], list[str]]:
    ours, others = [], []
    for name in ROWS:
        try:
            result = records.read_result(out / name)
        except ValueError:
            continue  # said by the driver, which measures it again
        if result is not None:
            (ours if result["fingerprint"].get("model") == identity else others).append(result)
    return ours, [result["row"] for result in others]


def marks(results: list[dict]) -> list[str]:
    """What must be read before any number."""
    limited = any(result["limit"] is not None for result in results)
    return [*[LIMITED] * limited, *[SAMPLE] * any(result["suite"] == "sample" for result in results)]


def table_row(result: dict) -> dict:
    """One line of the table, flat, under COLUMNS."""
    score, published = result["score"], TABLE_3[result["row"]]
    return {
        "row": result["row"],
        "title": result["title"],
        "measured": score["value"],
        "stderr": score["stderr"],
        "n": score["n"],
        "shots": result["shots"],
        "metric": score["metric"],
        "filter": score["filter"],
        "average": score["average"],
        "micro": score["micro"]["value"],
        "micro_stderr": score["micro"]["stderr"],
        "macro": score["macro"]["value"],
        "macro_stderr": score["macro"]["stderr"],
        "paper_baseline": published.baseline,
        "paper_attnres": published.attnres,
        "minus_baseline": score["value"] - published.baseline,
        "minus_attnres": score["value"] - published.attnres,
        "limit": result["limit"],
        "suite": result["suite"],
        "prompts_cut": result["prompts_cut"],
        "answers_short": result["answers_short"],
        "wall_seconds": result["wall_seconds"],
        "tokens_per_second": result["tokens_per_second"],
        "seeds": " ".join(map(str, [result["seeds"]["fewshot"], *result["seeds"]["choices"]])),
    }


def as_csv(table: dict) -> str:
    """Every line carries the mark: a line copied out of the file must not lose it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "mark"], lineterminator="\n")
    writer.writeheader()
    for row in table["rows"]:
        writer.writerow({**row, "mark": _row_mark(row)})
    return text.getvalue()


def as_markdown(table: dict) -> str:
    """For people: numbers, what is ours in the protocol, what they were measured with."""
    lines = [f"> **{mark}**\n" for mark in table["marks"]]
    lines += [
        "| Row | Measured | Shots | Metric | Items | Paper baseline | Paper AttnRes | Minus baseline | Minus AttnRes |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in table["rows"]:
        star = " †" if row["limit"] is not None else " ‡" if row["suite"] == "sample" else ""
        lines.append(
            f"| {row['title']}{star} | {_with_error(row['measured'], row['stderr'])} | {row['shots']} "
            f"| {row['metric']}, {row['filter']} | {row['n']} "
            f"| {row['paper_baseline']:.1f} | {row['paper_attnres']:.1f} "
            f"| {row['minus_baseline']:+.1f} | {row['minus_attnres']:+.1f} |"
        )
    lines.append("\nIn per cent, ± one standard error; differences from the paper's single runs in points.\n")
    lines += [f"† {LIMITED}.\n"] * any(row["limit"] is not None for row in table["rows"])
    lines += [f"‡ {SAMPLE}.\n"] * any(row["suite"] == "sample" for row in table["rows"])
    lines += [
        f"{row['title']}: over items (micro) {_with_error(row['micro'], row['micro_stderr'])}, over subtasks (macro) "
        f"{_with_error(row['macro'], row['macro_stderr'])}.\n"
        for row in table["rows"]
        if row["micro"] != row["macro"] or row["row"] == "mmlu"
    ]
    lines += [
        f"{row['title']}: {row['prompts_cut']} prompts are longer than the model's context and were cut from the left; "
        f"{row['answers_short']} answers had less room than the token limit.\n"
        for row in table["rows"]
        if row["prompts_cut"] or row["answers_short"]
    ]
    lines += [f"{ROWS[name].title}: failed. {reason}\n" for name, reason in table["failed"].items()]
    lines += [f"{ROWS[name].title}: skipped, it {reason}.\n" for name, reason in table["skipped"].items()]
    if table["of_other_models"]:
        lines.append(f"Left out, measured on another model: {', '.join(table['of_other_models'])}.\n")
    return "\n".join([*lines, *_protocol(table), *_conditions(table), ""])


def _protocol(table: dict) -> list[str]:
    """What is not published, per row."""
    lines = ["## Choices that are ours", ""]
    for row in table["rows"]:
        ours = [choice for choice in table["protocol"][row["row"]] if choice["origin"] == "ours"]
        shown = "; ".join(f"{choice['choice']} {choice['value']}" for choice in ours)
        lines.append(f"- {row['title']}: {shown}")
    return [*lines, ""]


def _conditions(table: dict) -> list[str]:
    lines = ["## Measured with", "", f"- model: {_pairs(table['model'])}"]
    for name, title in (("versions", "packages"), ("settings", "settings")):
        values = list(table[name].values())
        if values and all(each == values[0] for each in values):
            lines.append(f"- {title}: {_pairs(values[0])}")
        else:
            lines += [f"- {title} of {row}: {_pairs(each)}" for row, each in table[name].items()]
    lines += [
        f"- {row['title']}: {row['wall_seconds']:.1f} s"
        + (f", {row['tokens_per_second']:.0f} tokens/s" if row["tokens_per_second"] else "")
        + f", seeds {row['seeds']}"
        for row in table["rows"]
    ]
    return lines


def _row_mark(row: dict) -> str:
    return LIMITED if row["limit"] is not None else SAMPLE if row["suite"] == "sample" else ""


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _pairs(values: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, ""))
