"""The card's sections, in order, as Markdown."""

from urllib.parse import quote

from ..configuration_attnres import AttnResConfig
from . import architecture, evaluation
from .markdown import plain
from .measured import Measured
from .provenance import Provenance

PAPER = "[Attention Residuals](https://arxiv.org/abs/2603.15031) (AttnRes; Kimi Team, 2026)"
CITATION = """\
```bibtex
@misc{attnres2026,
  title = {Attention Residuals},
  author = {Kimi Team},
  year = {2026},
  eprint = {2603.15031},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2603.15031}
}
```"""
RUN = (
    "These lines were run, one block after the other, on this very folder before it was finished, offline and in a "
    "process without the `attnres` package ({versions})."
)
NOT_RUN = "These lines were not run when this card was written: the model was not loaded."


def card_body(
    name: str,
    facts: dict,
    config: AttnResConfig,
    provenance: Provenance,
    measured: Measured,
    snippets: dict[str, str],
    ran_with: str | None,
    figures: dict[str, str],
) -> str:
    """Everything below the front matter.

    Args:
        name: of the model.
        facts: of its checkpoint, as `conversion.inspection.inspect_checkpoint` gives them.
        snippets: title and code of usage.
        ran_with: the versions of packages that they ran with; None if they did not run.
        figures: titles and texts of the sections with figures.
    """
    sections = [("Architecture", architecture.architecture(facts, config)), ("Depth", architecture.depth(config))]
    sections += [("Usage", _usage(snippets, ran_with)), ("Evaluation", evaluation.measured_table(measured))]
    if measured.rows:
        sections.append(("The paper's numbers (another model)", evaluation.paper_table(measured)))
    if measured.smoke:
        sections.append(("Smoke test (no benchmark)", evaluation.smoke_table(measured)))
    sections += figures.items()
    if provenance.report is not None:
        sections.append(("Conversion report", architecture.conversion(provenance.report, facts)))
    sections += [
        ("Limitations", _limitations(facts, measured, ran_with is None)),
        ("Licence and origin", _origin(provenance)),
        ("Citation", CITATION),
    ]
    parts = [f"# {plain(name)}", _introduction(facts, config)]
    parts += [f"## {title}\n\n{text}" for title, text in sections]
    return "\n\n".join(parts) + "\n"


def _introduction(facts: dict, config: AttnResConfig) -> str:
    what = {
        "block": f"{PAPER} over blocks",
        "full": f"{PAPER} over all sublayers",
        "standard": f"plain residuals, a baseline for {PAPER}",
    }[config.residual_mode]
    mixing = (
        ""
        if config.residual_mode == "standard"
        else " Instead of adding every sublayer's output to one residual stream with weight 1, every sublayer attends, "
        "with a learned pseudo-query, over the outputs of earlier ones."
    )
    return (
        f"A causal language model: a `{facts['family']}` backbone with {what}.{mixing} "
        "The code that it needs is in this repository."
    )


def _usage(snippets: dict[str, str], ran_with: str | None) -> str:
    text = [NOT_RUN if ran_with is None else RUN.format(versions=ran_with)]
    text += [f"{title}:\n\n```python\n{code}```" for title, code in snippets.items()]
    return "\n\n".join(text)


def _limitations(facts: dict, measured: Measured, not_run: bool) -> str:
    lines = [
        "Loading runs the Python files of this repository (`trust_remote_code=True`): read them first.",
        "A language model writes what is likely, not what is true, and may repeat what is harmful or private in its "
        "training text. Its safety and its biases were not examined for this card.",
    ]
    if facts["depth_tensors"] == "pseudo-queries are zero":
        lines.append("The pseudo-queries are zero: so far depth mixing changes nothing.")
    if not measured.rows:
        lines.append("No benchmark has been run on these weights, so nothing is known of how good it is.")
    else:
        lines.append(
            "Scores are those of one harness, one prompt format and one seed of the examples; differences within the "
            "standard error say nothing. They are not comparable with the paper's numbers, which another harness gave "
            "for another model."
        )
    if not_run:
        lines.append("The usage snippets were not run, and there is no figure of the depth weights.")
    return "\n".join(f"- {line}" for line in lines)


def _origin(provenance: Provenance) -> str:
    if provenance.license is None:
        licence = (
            "The licence of this checkpoint is not stated: neither its card nor a licence file says it. Who publishes "
            "it must say it; `attnres card --license` sets it."
        )
    else:
        licence = f"Licence: {plain(provenance.license)}, {plain(provenance.license_from)}."
    if provenance.base_model:
        links = (f"[{plain(each)}](https://huggingface.co/{quote(each)})" for each in provenance.base_model)
        origin = f"Derived from {', '.join(links)}."
    elif provenance.report is not None:
        origin = "Converted from another checkpoint, whose name is not recorded in this folder."
    else:
        origin = "No base model is recorded in this folder."
    return f"{licence}\n\n{origin}"
