"""The rows of the paper's table, which rows.yaml lists: lm-eval tasks, their settings, and the source of each choice.

A row names leaf tasks, tags or groups of lm-eval. scores.py computes its own numbers from the items of all leaf tasks.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

OWN_TASKS = Path(__file__).parent / "tasks"
MIN_GENERATED_TOKENS = 1024  # lm-eval's 256, where a task sets no limit, cuts worked solutions off before the answer


class Published(NamedTuple):
    """What the paper's Table 3 reports for a row: base models after 1.4T tokens, in per cent."""

    baseline: float
    attnres: float


@dataclass(frozen=True)
class Row:
    """One row of the table. Each `..._source` says who published the choice, or that it is our choice."""

    name: str  # on the command line, and of the row's folder
    title: str  # as the paper prints it
    paper: Published
    tasks: tuple[str, ...]  # names of lm-eval tasks, tags or groups
    folder: str | None  # of the tasks' YAML files, relative to lm-eval's folder of tasks; None for OWN_TASKS
    shots: int  # solved examples before each question
    shots_source: str
    metric: str  # of the printed score
    filter: str  # lm-eval's filter of the answers; "none" if there is none
    scoring: str  # "likelihood" of given answers, or the answer read from a "generation"
    scoring_source: str
    secondary: tuple[tuple[str, str], ...] = ()  # further (metric, filter) pairs
    average: str = "items"  # of the printed score: over "items" (micro) or over "subtasks" (macro)
    seeds: int = 1  # orders of the choices that are averaged
    code: bool = False  # whether programs that the model wrote are run
    note: str = ""  # further choices of ours
    chat_tasks: tuple[str, ...] = ()  # instead of `tasks` when prompts are wrapped in a chat template

    @property
    def protocol(self) -> list[dict[str, str]]:
        """Every choice with its source; `origin` is "published" or "ours"."""
        choices = [
            ("shots", str(self.shots), self.shots_source),
            ("scoring", self.scoring, self.scoring_source),
            ("prompt", "of lm-eval 0.4.13" if self.folder else "of our task", "not published: our choice"),
        ]
        if self.scoring == "generation":
            choices += [
                ("decoding", "greedy", "our choice; Kimi Linear's report samples at temperature 1.0"),
                ("token limit", f"at least {MIN_GENERATED_TOKENS}", "not published: our choice"),
            ]
        if self.seeds > 1:
            choices += [("runs", f"mean over {self.seeds} orders of the choices", "Kimi Linear's report: eight runs")]
        if self.note:
            choices += [("note", self.note, "our choice")]
        protocol = [{"choice": what, "value": value, "source": source} for what, value, source in choices]
        for each in protocol:
            each["origin"] = "ours" if "our choice" in each["source"] else "published"
        return protocol


def _read_rows() -> dict[str, Row]:
    content = yaml.safe_load(Path(__file__).with_name("rows.yaml").read_text(encoding="utf-8"))
    rows = {}
    for name, fields in content.items():
        fields["paper"] = Published(*fields["paper"])
        fields["secondary"] = tuple(map(tuple, fields.get("secondary", ())))
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        rows[name] = Row(name, **{**fields, **lists})
    return rows


ROWS = _read_rows()
SUITES = {
    "paper": tuple(ROWS),
    "readme": ("mmlu", "gpqa_diamond", "bbh", "triviaqa", "math", "humaneval", "mbpp", "cmmlu", "ceval"),
    "sample": tuple(ROWS),  # the same task definitions on the miniature items of attnres/eval/sample
}


def select_rows(suite: str) -> list[Row]:
    """Returns the rows of a suite, or of several suites and rows joined by commas, in the order of the table."""
    names, known = [part.strip() for part in suite.split(",")], [*SUITES, *ROWS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown suite or row {name!r}.{hint} Suites and rows: {', '.join(known)}.")
    if "sample" in names and len(names) > 1:
        raise ValueError("the suite 'sample' has items of its own: run it alone.")
    wanted = {row for name in names for row in SUITES.get(name, (name,))}
    return [row for name, row in ROWS.items() if name in wanted]
