"""The card's figures and their captions: depth weights over a text, training dynamics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import logging as transformers_logging

from .. import plots
from ..analysis.dynamics_runs import as_markdown, read_runs
from ..analysis.inspection import inspect, panels
from ..conversion.verification import PROMPTS
from .markdown import plain

DEPTH_WEIGHTS, DYNAMICS = "depth-weights.png", "training-dynamics.png"
MAX_TOKENS = 16_384  # of a text: enough for means, and minutes at most on a CPU
OWN_TEXT = "four short texts that come with the attnres package (English, German, Python)"
CHOSEN_TEXT = "a text that the author of this card chose"


def draw_depth_weights(
    folder: Path, model: Path, name: str, text: str | PathLike | None, progress: bool = False
) -> str:
    """Draws which sources each sublayer mixes over a text; returns the section.

    Args:
        folder: where the figure goes.
        model: folder of the checkpoint.
        name: of the model, for the title.
        text: file in UTF-8, None for short texts of our own.
        progress: show a bar on stderr.

    Raises:
        ValueError: the text cannot be read or is too short, or model and tokenizer do not belong together.
    """
    if text is not None and not Path(text).is_file():
        raise ValueError(f"{text}: no such text file.")
    with TemporaryDirectory(prefix="attnres-card-") as temporary, _quiet():
        path = Path(temporary) / "text.txt" if text is None else Path(text)
        if text is None:
            path.write_text("\n\n".join(PROMPTS), encoding="utf-8")
        (weights,), _ = inspect({name: model}, path, Path(temporary) / "out", max_tokens=MAX_TOKENS, progress=progress)
    weights = replace(weights, text=OWN_TEXT if text is None else CHOSEN_TEXT)  # not the name of a file
    plots.depth_panels(folder / DEPTH_WEIGHTS, [panels(weights)])
    overall = weights.summary()["overall"].get("all")
    summary = (
        f" Mixtures of two sources or more spread over {overall['effective_sources']:.2f} sources (the exponential of "
        f"the entropy, mean over {overall['mixtures']} mixtures), with {overall['newest']:.1%} of the weight on the "
        f"newest source and {overall['embedding']:.1%} on the embedding."
        if overall
        else ""
    )
    return (
        f"![Mean depth weight of every source in every mixture]({DEPTH_WEIGHTS})\n\n"
        "A row per decoder layer; a column per source, from the embedding on; each row sums to 1. Mean over "
        f"{weights.num_tokens:,} tokens of {weights.text}.{summary}"
    )


def draw_dynamics(folder: Path, runs: Sequence[str | PathLike]) -> str:
    """Draws what trainings logged; returns the section.

    Raises:
        ValueError: a run logged nothing, or its state is damaged.
    """
    found = read_runs(runs)
    plots.training_dynamics(folder / DYNAMICS, [asdict(run) for run in found])
    table = as_markdown([replace(run, name=plain(run.name)) for run in found])
    return (
        f"![Validation loss over steps, output magnitude and gradient norm over decoder layers]({DYNAMICS})\n\n"
        f"As logged while training, at the last step that was measured.\n\n{table.strip()}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' bars and advice for as long as the block lasts."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
