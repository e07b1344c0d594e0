"""The rows of the paper's table as data: the lm-eval tasks of a row, their settings, and the source of each choice.

A row names leaf tasks, tags or groups of lm-eval. scores.py computes its own numbers from the items of all leaf tasks.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

OWN_TASKS = Path(__file__).parent / "tasks"
MIN_GENERATED_TOKENS = 1024  # lm-eval's 256, where a task sets no limit, cuts worked solutions off before the answer

KIMI_FAMILY = "reports of the Kimi family"
NO_SHOTS_PUBLISHED = "not published: our choice"
LIKELIHOOD, GENERATION = "likelihood", "generation"
OUR_LIKELIHOOD = "our choice, lm-eval's; Kimi Linear's report generates"

MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
MGSM_TASKS = tuple(f"mgsm_native_cot_{language}" for language in MGSM_LANGUAGES)
MATH_SUBJECTS = (
    "algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalc",
)  # fmt: skip
MATH_TASKS = tuple(f"minerva_math_{subject}" for subject in MATH_SUBJECTS)


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


ROWS = {
    row.name: row
    for row in (
        Row(
            "mmlu", "MMLU", Published(73.5, 74.6), ("mmlu",), "mmlu/default", 5, "Kimi Linear, Moonlight, K2",
            "acc", "none", LIKELIHOOD, "Kimi Linear",
        ),
        Row(
            "mmlu_pro", "MMLU-Pro", Published(52.2, 52.2), ("mmlu_pro",), "mmlu_pro", 5, KIMI_FAMILY,
            "exact_match", "custom-extract", GENERATION, KIMI_FAMILY,
        ),
        Row(
            "gpqa_diamond", "GPQA-Diamond", Published(36.9, 44.4), ("attnres_gpqa_diamond",), None, 5,
            "Kimi Linear, K2", "acc", "none", LIKELIHOOD, "Kimi Linear", seeds=8,
        ),
        Row(
            "bbh", "BBH", Published(76.3, 78.0), ("bbh_cot_fewshot",), "bbh/cot_fewshot", 3, "Moonlight",
            "exact_match", "get-answer", GENERATION, "Moonlight",
        ),
        Row(
            "arc_challenge", "ARC-Challenge", Published(64.6, 65.7), ("arc_challenge",), "arc", 25, NO_SHOTS_PUBLISHED,
            "acc_norm", "none", LIKELIHOOD, OUR_LIKELIHOOD, (("acc", "none"),),
        ),
        Row(
            "hellaswag", "HellaSwag", Published(83.2, 83.4), ("hellaswag",), "hellaswag", 10, NO_SHOTS_PUBLISHED,
            "acc_norm", "none", LIKELIHOOD, OUR_LIKELIHOOD, (("acc", "none"),),
        ),
        Row(
            "triviaqa", "TriviaQA", Published(69.9, 71.8), ("triviaqa",), "triviaqa", 5, KIMI_FAMILY,
            "exact_match", "remove_whitespace", GENERATION, KIMI_FAMILY,
        ),
        Row(
            "gsm8k", "GSM8K", Published(81.7, 82.4), ("gsm8k",), "gsm8k", 8, "Kimi Linear (Moonlight: 4)",
            "exact_match", "strict-match", GENERATION, "Kimi Linear", (("exact_match", "flexible-extract"),),
        ),
        Row(
            "mgsm", "MGSM", Published(64.9, 66.1), MGSM_TASKS, "mgsm/native_cot", 8, NO_SHOTS_PUBLISHED, "exact_match",
            "flexible-extract", GENERATION, "Kimi Linear", (("exact_match", "strict-match"),), average="subtasks",
            note="mean over eleven languages, worked in each; strict-match wants an English phrase in Bengali answers",
        ),
        Row(
            "math", "MATH", Published(53.5, 57.1), MATH_TASKS, "minerva_math", 4, f"{KIMI_FAMILY}; fixed examples",
            "math_verify", "none", GENERATION, KIMI_FAMILY, (("exact_match", "none"),),
            note="math_verify reads any form of the answer; exact_match needs the phrase of the examples",
        ),
        Row(
            "cmath", "CMath", Published(84.7, 85.1), ("attnres_cmath",), None, 6, "Kimi Linear",
            "exact_match", "none", GENERATION, "Kimi Linear", note="six worked examples of our own",
        ),
        Row(
            "humaneval", "HumanEval", Published(59.1, 62.2), ("humaneval",), "humaneval", 0, KIMI_FAMILY,
            "pass@1", "create_test", GENERATION, KIMI_FAMILY, code=True, chat_tasks=("humaneval_instruct",),
        ),
        Row(
            "mbpp", "MBPP", Published(72.0, 73.9), ("mbpp",), "mbpp", 3, NO_SHOTS_PUBLISHED,
            "pass_at_1", "none", GENERATION, KIMI_FAMILY, code=True,
        ),
        Row(
            "cmmlu", "CMMLU", Published(82.0, 82.9), ("cmmlu",), "cmmlu", 5, KIMI_FAMILY,
            "acc", "none", LIKELIHOOD, KIMI_FAMILY,
        ),
        Row(
            "ceval", "C-Eval", Published(79.6, 82.5), ("ceval-valid",), "ceval", 5, KIMI_FAMILY,
            "acc", "none", LIKELIHOOD, "Kimi Linear", note="the validation split, whose answers are public",
        ),
    )
}  # fmt: skip

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
