"""The card's figures with their captions: depth weights over a text, and training dynamics."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import plots
from ..analysis.dynamics_runs import as_markdown, read_runs
from ..analysis.inspection import inspect, panels
from ..conversion.verification import PROMPTS
from ..messages import quiet_transformers
from .card import plain

DEPTH_WEIGHTS, DYNAMICS = "depth-weights.png", "training-dynamics.png"
MAX_TOKENS = 16_384  # enough for stable means, and at most minutes on a CPU


def draw_depth_weights(
    folder: Path, model: Path, name: str, text: str | PathLike | None, progress: bool = False
) -> str:
    """Draws the mean depth weights of a checkpoint over a text and returns the Markdown of the section.

    The figure is written to `folder`. Without a UTF-8 file `text`, short texts that come with the package are read.
    """
    if text is not None and not Path(text).is_file():
        raise ValueError(f"{text}: no such text file.")
    with TemporaryDirectory(prefix="attnres-card-") as temporary, quiet_transformers():
        path = Path(text or Path(temporary) / "text.txt")
        if text is None:
            path.write_text("\n\n".join(PROMPTS), encoding="utf-8")
        (weights,), _ = inspect({name: model}, path, Path(temporary) / "out", max_tokens=MAX_TOKENS, progress=progress)
    # The card does not publish the name of a local file.
    what = "four short texts that come with the attnres package (English, German, Python)"
    weights = replace(weights, text=what if text is None else "a text that the author of this card chose")
    plots.depth_panels(folder / DEPTH_WEIGHTS, [panels(weights)])
    summary = ""
    if overall := weights.summary()["overall"].get("all"):
        summary = (
            f" Mixtures of two or more sources spread over {overall['effective_sources']:.2f} sources (exponential of "
            f"the entropy, mean over {overall['mixtures']} mixtures), with {overall['newest']:.1%} of the weight on "
            f"the newest source and {overall['embedding']:.1%} on the embedding."
        )
    return (
        f"![Mean depth weight of every source in every mixture]({DEPTH_WEIGHTS})\n\n"
        "One row per decoder layer, one column per source, starting with the embedding; each row sums to 1. Mean over "
        f"{weights.num_tokens:,} tokens of {weights.text}.{summary}"
    )


def draw_dynamics(folder: Path, runs: Sequence[str | PathLike]) -> str:
    """Draws the logged dynamics of training runs and returns the Markdown of the section."""
    found = read_runs(runs)
    plots.training_dynamics(folder / DYNAMICS, [asdict(run) for run in found])
    table = as_markdown([replace(run, name=plain(run.name)) for run in found])
    return (
        f"![Validation loss over steps, output magnitude and gradient norm over decoder layers]({DYNAMICS})\n\n"
        f"As logged during training, at the last step that was measured.\n\n{table.strip()}"
    )
