"""The card's benchmark sections: measured results, the paper's numbers, and the smoke test."""

from ..eval.published import TABLE_3
from ..eval.results import SAMPLE
from ..eval.suites import ROWS
from .front_matter import shown_value
from .markdown import plain, table
from .measured import Measured

NOTHING = "Nothing has been measured on this checkpoint yet: there are no results to show."
PAPER = (
    "Quoted, not measured here: Table 3 of the paper ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031)), a 48B-A3B "
    "Kimi Linear after 1.4T tokens, in the authors' own harness. It is another model than this one; the table says "
    "what difference AttnRes made there."
)
SMOKE = f"**{SAMPLE}.**"
MEASURED_WITH = ("lm_eval", "transformers", "torch", "attnres")


def measured_table(measured: Measured) -> str:
    """What was measured on these weights, and how."""
    rows = list(measured.rows.values())
    if not rows:
        return NOTHING
    remarks = ["In per cent, ± one standard error over the items.", *_remarks(rows)]
    return "\n\n".join([_scores(rows), *remarks, _protocol(rows)])


def paper_table(measured: Measured) -> str:
    """The paper's numbers for the rows that were measured."""
    rows = [
        (ROWS[name].title, f"{TABLE_3[name].baseline:.1f}", f"{TABLE_3[name].attnres:.1f}") for name in measured.rows
    ]
    return PAPER + "\n\n" + table(("Row", "Paper: baseline", "Paper: AttnRes"), rows, right=(1, 2))


def smoke_table(measured: Measured) -> str:
    """What the sample suite gave, for those who ran it."""
    return SMOKE + "\n\n" + _scores(list(measured.smoke.values()))


def _scores(rows: list[dict]) -> str:
    cells = []
    for result in rows:
        score = result["score"]
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.2f}"
        cells.append(
            (
                ROWS[result["row"]].title,
                f"{shown_value(result):.2f}{error}",
                result["shots"],
                ROWS[result["row"]].scoring,
                plain(score["metric"] if score["filter"] == "none" else f"{score['metric']}, {score['filter']}"),
                f"{score['n']:,}",
            )
        )
    return table(("Row", "Score", "Shots", "Scoring", "Metric", "Items"), cells, right=(1, 2, 5))


def _remarks(rows: list[dict]) -> list[str]:
    return [
        f"{ROWS[result['row']].title}: {result['prompts_cut']} prompts were longer than the model's context and cut "
        f"from the left; {result['answers_short']} answers had less room than the token limit."
        for result in rows
        if result["prompts_cut"] or result["answers_short"]
    ]


def _protocol(rows: list[dict]) -> str:
    lines = []
    for result in rows:
        choices = [
            f"{plain(each['choice'])} {plain(each['value'])} ({plain(each.get('source', each['origin']))})"
            for each in result["protocol"]
        ]
        lines.append(f"- {ROWS[result['row']].title}: {'; '.join(choices)}")
    settings = sorted({_conditions(result) for result in rows})
    return "Protocol, and who says so:\n\n" + "\n".join([*lines, *(f"- measured with {each}" for each in settings)])


def _conditions(result: dict) -> str:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in MEASURED_WITH if name in result["versions"])
    settings = result["settings"]
    facts = {
        "dtype": result["model"].get("dtype"),
        "batch size": settings.get("batch_size"),
        "seed": settings.get("seed"),
    }
    if settings.get("chat_template"):
        facts["prompts"] = "in the chat template"
    return plain(", ".join([versions, *(f"{name} {value}" for name, value in facts.items() if value is not None)]))
