"""Writes results as JSON and Markdown."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..eval.identity import versions


def markdown_table(header: str, rows: Iterable[str]) -> str:
    """Returns a Markdown table of lines such as `model | steps`, with all columns but the first aligned right."""
    return "\n".join([f"| {header} |", f"|---|{'--:|' * header.count('|')}", *(f"| {row} |" for row in rows)])


def interval_text(interval: tuple[float, float], form: str = ".3f") -> str:
    """Returns an interval as text, with both ends in the given number format."""
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def write(results: dict, summary: str, folder: Path):
    """Writes `results.json` and `results.md`, which shows the summary, the figures, the settings and the versions."""
    results["versions"] = versions(("torch", "transformers", "tokenizers", "lm_eval"))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figures = "\n\n".join(f"![{path.stem}]({path.name})" for path in sorted(folder.glob("*.png")))
    settings = markdown_table("setting | value", (f"{name} | {value}" for name, value in results["settings"].items()))
    used = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    (folder / "results.md").write_text(
        f"# attnres demo\n\n{summary}\n\n## Figures\n\n{figures}\n\n## Settings\n\n{settings}\n\n"
        f"{used}; {results['threads']} threads; {results['seconds']} s in all.\n",
        encoding="utf-8",
    )
