"""The rows of the paper's table as data: the lm-eval tasks of a row, their settings, and the source of each choice.

A row names leaf tasks, tags or groups of lm-eval; its own numbers are computed from the items (scores.py).
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

OWN_TASKS = Path(__file__).parent / "tasks"
MIN_GENERATED_TOKENS = 1024  # lm-eval's 256, where a task sets none, cuts worked solutions off before the answer

KIMI_FAMILY = "reports of the Kimi family"
NO_SHOTS_PUBLISHED = "not published: our choice"
MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
MATH_SUBJECTS = (
    "algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalc",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: on the command line and as a folder.
        title: as the paper prints it.
        tasks: names of lm-eval tasks, tags or groups.
        folder: of their YAML files, below lm-eval's tasks; None for our own.
        shots: solved examples before each question.
        shots_source: who published that number, or that it is our choice.
        metric: of the printed score.
        filter: of the answers, as lm-eval names it ("none" where there is none).
        scoring: "likelihood" of given answers, or the answer read from a "generation".
        scoring_source: as for the shots.
        secondary: further (metric, filter) pairs.
        average: "items" (micro) or "subtasks" (macro) for the printed score.
        seeds: how many orders of the choices are averaged.
        code: runs programs that the model wrote.
        note: anything else in which the row is ours.
        chat_tasks: instead of `tasks` where prompts are wrapped in a chat template.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    folder: str | None
    shots: int
    shots_source: str
    metric: str
    filter: str
    scoring: str
    scoring_source: str
    secondary: tuple[tuple[str, str], ...] = ()
    average: str = "items"
    seeds: int = 1
    code: bool = False
    note: str = ""
    chat_tasks: tuple[str, ...] = ()

    @property
    def protocol(self) -> list[dict[str, str]]:
        """Every choice with where it comes from; `origin` is "published" or "ours"."""
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
            choices.append(
                ("runs", f"mean over {self.seeds} orders of the choices", "Kimi Linear's report: eight runs")
            )
        if self.note:
            choices.append(("note", self.note, "our choice"))
        return [
            {"choice": what, "value": value, "source": source, "origin": "ours" if _is_ours(source) else "published"}
            for what, value, source in choices
        ]


def _is_ours(source: str) -> bool:
    return "our choice" in source


LIKELIHOOD, GENERATION = "likelihood", "generation"
OUR_LIKELIHOOD = "our choice, lm-eval's; Kimi Linear's report generates"

ROWS = {
    row.name: row
    for row in (
        Row(
            "mmlu", "MMLU", ("mmlu",), "mmlu/default", 5, "Kimi Linear, Moonlight, K2",
            "acc", "none", LIKELIHOOD, "Kimi Linear",
        ),
        Row(
            "mmlu_pro", "MMLU-Pro", ("mmlu_pro",), "mmlu_pro", 5, KIMI_FAMILY,
            "exact_match", "custom-extract", GENERATION, KIMI_FAMILY,
        ),
        Row(
            "gpqa_diamond", "GPQA-Diamond", ("attnres_gpqa_diamond",), None, 5, "Kimi Linear, K2",
            "acc", "none", LIKELIHOOD, "Kimi Linear", seeds=8,
        ),
        Row(
            "bbh", "BBH", ("bbh_cot_fewshot",), "bbh/cot_fewshot", 3, "Moonlight",
            "exact_match", "get-answer", GENERATION, "Moonlight",
        ),
        Row(
            "arc_challenge", "ARC-Challenge", ("arc_challenge",), "arc", 25, NO_SHOTS_PUBLISHED,
            "acc_norm", "none", LIKELIHOOD, OUR_LIKELIHOOD, (("acc", "none"),),
        ),
        Row(
            "hellaswag", "HellaSwag", ("hellaswag",), "hellaswag", 10, NO_SHOTS_PUBLISHED,
            "acc_norm", "none", LIKELIHOOD, OUR_LIKELIHOOD, (("acc", "none"),),
        ),
        Row(
            "triviaqa", "TriviaQA", ("triviaqa",), "triviaqa", 5, KIMI_FAMILY,
            "exact_match", "remove_whitespace", GENERATION, KIMI_FAMILY,
        ),
        Row(
            "gsm8k", "GSM8K", ("gsm8k",), "gsm8k", 8, "Kimi Linear (Moonlight: 4)",
            "exact_match", "strict-match", GENERATION, "Kimi Linear", (("exact_match", "flexible-extract"),),
        ),
        Row(
            "mgsm", "MGSM", tuple(f"mgsm_native_cot_{language}" for language in MGSM_LANGUAGES), "mgsm/native_cot", 8,
            NO_SHOTS_PUBLISHED, "exact_match", "flexible-extract", GENERATION, "Kimi Linear",
            (("exact_match", "strict-match"),), average="subtasks",
            note="mean over eleven languages, worked in each; strict-match wants an English phrase in Bengali answers",
        ),
        Row(
            "math", "MATH", tuple(f"minerva_math_{subject}" for subject in MATH_SUBJECTS), "minerva_math", 4,
            f"{KIMI_FAMILY}; fixed examples", "math_verify", "none", GENERATION, KIMI_FAMILY,
            (("exact_match", "none"),),
            note="math_verify reads any form of the answer; exact_match needs the phrase of the examples",
        ),
        Row(
            "cmath", "CMath", ("attnres_cmath",), None, 6, "Kimi Linear",
            "exact_match", "none", GENERATION, "Kimi Linear", note="six worked examples of our own",
        ),
        Row(
            "humaneval", "HumanEval", ("humaneval",), "humaneval", 0, KIMI_FAMILY,
            "pass@1", "create_test", GENERATION, KIMI_FAMILY, code=True, chat_tasks=("humaneval_instruct",),
        ),
        Row(
            "mbpp", "MBPP", ("mbpp",), "mbpp", 3, NO_SHOTS_PUBLISHED,
            "pass_at_1", "none", GENERATION, KIMI_FAMILY, code=True,
        ),
        Row(
            "cmmlu", "CMMLU", ("cmmlu",), "cmmlu", 5, KIMI_FAMILY,
            "acc", "none", LIKELIHOOD, KIMI_FAMILY,
        ),
        Row(
            "ceval", "C-Eval", ("ceval-valid",), "ceval", 5, KIMI_FAMILY,
            "acc", "none", LIKELIHOOD, "Kimi Linear", note="the validation split, whose answers are public",
        ),
    )
}  # fmt: skip

SUITES = {
    "paper": tuple(ROWS),
    "readme": ("mmlu", "gpqa_diamond", "bbh", "triviaqa", "math", "humaneval", "mbpp", "cmmlu", "ceval"),
    "sample": tuple(ROWS),  # the same task definitions over the miniature items of attnres/eval/sample
}


def select_rows(suite: str) -> list[Row]:
    """The rows of a suite, or of rows and suites joined by commas, each once, in the order of the table.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    wanted: set[str] = set()
    for name in (part.strip() for part in suite.split(",")):
        if name in SUITES:
            wanted.update(SUITES[name])
        elif name in ROWS:
            wanted.add(name)
        else:
            known = [*SUITES, *ROWS]
            near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown suite or row {name!r}.{hint} Suites and rows: {', '.join(known)}.")
    if "sample" in suite.split(",") and suite != "sample":
        raise ValueError("the suite 'sample' has items of its own: run it alone.")
    return [row for name, row in ROWS.items() if name in wanted]
