"""Writes the table over finished rows as Markdown, CSV and JSON."""

import csv
import io
from pathlib import Path

from . import records
from .suites import ROWS

LIMITED = "LIMITED RUN: only some items of each task; not a result of the benchmark"
SAMPLE = "SAMPLE ITEMS: miniature questions of our own; says whether everything works, nothing about the benchmarks"
COLUMNS = (
    "row", "title", "measured", "stderr", "n", "shots", "metric", "filter", "average", "micro", "micro_stderr", "macro",
    "macro_stderr", "paper_baseline", "paper_attnres", "minus_baseline", "minus_attnres", "limit", "suite",
    "prompts_cut", "answers_short", "wall_seconds", "tokens_per_second", "seeds",
)  # fmt: skip


def write_tables(out: Path, identity: dict, failed: dict | None = None, skipped: dict | None = None) -> None:
    """Writes results.md, .csv and .json over the rows in `out` that were measured on the model of this identity."""
    results, of_other_models = [], []
    for name in ROWS:
        try:
            result = records.read_result(out / name)
        except ValueError:
            continue  # the driver reports it and measures the row again
        if result is not None:
            (results if result["fingerprint"].get("model") == identity else of_other_models).append(result)
    table = {
        "marks": marks(results),
        "rows": [table_row(result) for result in results],
        "failed": failed or {},
        "skipped": skipped or {},
        "of_other_models": [result["row"] for result in of_other_models],
        "model": results[0]["model"] if results else identity,
        **{key: {each["row"]: each[key] for each in results} for key in ("versions", "settings", "protocol")},
    }
    records.write_json(out / "results.json", table)
    records.write_text(out / "results.csv", [as_csv(table)])
    records.write_text(out / "results.md", [as_markdown(table)])


def marks(rows: list[dict]) -> list[str]:
    """Returns what must be read before any number of these results or table rows."""
    return [mark for mark in (LIMITED, SAMPLE) if any(mark in _marks(row) for row in rows)]


def _marks(row: dict) -> list[str]:
    return [LIMITED] * (row["limit"] is not None) + [SAMPLE] * (row["suite"] == "sample")


def table_row(result: dict) -> dict:
    """Returns one row of the table: a value for each of COLUMNS."""
    score, paper = result["score"], ROWS[result["row"]].paper
    values = {
        **result,
        **score,
        "measured": score["value"],
        **{key: score[key]["value"] for key in ("micro", "macro")},
        **{f"{key}_stderr": score[key]["stderr"] for key in ("micro", "macro")},
        "paper_baseline": paper.baseline,
        "paper_attnres": paper.attnres,
        "minus_baseline": score["value"] - paper.baseline,
        "minus_attnres": score["value"] - paper.attnres,
        "seeds": " ".join(map(str, [result["seeds"]["fewshot"], *result["seeds"]["choices"]])),
    }
    return {column: values[column] for column in COLUMNS}


def as_csv(table: dict) -> str:
    """Returns the table as CSV; every line carries its mark, which must not be lost when the line is copied."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "mark"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "mark": next(iter(_marks(row)), "")} for row in table["rows"])
    return text.getvalue()


def as_markdown(table: dict) -> str:
    """Returns the numbers, and which choices of the protocol are ours."""
    rows = table["rows"]
    signs = {LIMITED: " †", SAMPLE: " ‡"}
    cells = [
        {
            "Row": row["title"] + next((signs[mark] for mark in _marks(row)), ""),
            "Measured": _with_error(row["measured"], row["stderr"]), "Shots": row["shots"],
            "Metric": f"{row['metric']}, {row['filter']}", "Items": row["n"],
            "Paper baseline": f"{row['paper_baseline']:.1f}", "Paper AttnRes": f"{row['paper_attnres']:.1f}",
            "Minus baseline": f"{row['minus_baseline']:+.1f}", "Minus AttnRes": f"{row['minus_attnres']:+.1f}",
        }
        for row in rows
    ]  # fmt: skip
    lines = [*(f"> **{mark}**\n" for mark in table["marks"]), *markdown_table(cells)]
    lines.append("\nIn per cent, ± one standard error; differences from the paper's single runs in points.\n")
    lines += [f"{signs[mark].strip()} {mark}.\n" for mark in marks(rows)]
    for row in rows:
        if row["micro"] != row["macro"]:
            micro, macro = (_with_error(row[key], row[f"{key}_stderr"]) for key in ("micro", "macro"))
            lines.append(f"{row['title']}: over items (micro) {micro}, over subtasks (macro) {macro}.\n")
    for row in rows:
        if row["prompts_cut"] or row["answers_short"]:
            lines.append(
                f"{row['title']}: {row['prompts_cut']} prompts are longer than the model's context and were cut from "
                f"the left; {row['answers_short']} answers had less room than the token limit.\n"
            )
    lines += [f"{ROWS[name].title}: failed. {reason}\n" for name, reason in table["failed"].items()]
    lines += [f"{ROWS[name].title}: skipped, it {reason}.\n" for name, reason in table["skipped"].items()]
    if table["of_other_models"]:
        lines.append(f"Left out, measured on another model: {', '.join(table['of_other_models'])}.\n")
    lines += ["## Choices that are ours", ""]
    for row in rows:
        choices = table["protocol"][row["row"]]
        ours = [f"{choice['choice']} {choice['value']}" for choice in choices if choice["origin"] == "ours"]
        lines.append(f"- {row['title']}: {'; '.join(ours)}")
    return "\n".join([*lines, "\nresults.json has the model's hashes, packages, settings and seeds.", ""])


def markdown_table(rows: list[dict]) -> list[str]:
    """Returns the lines of a Markdown table whose columns but the first are aligned to the right."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in [*rows[:1], *(row.values() for row in rows)]]
    return lines and [lines[0], f"|---{'|---:' * (len(rows[0]) - 1)}|", *lines[1:]]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
