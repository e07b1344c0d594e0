"""Writes the depth weights of checkpoints over a text: statistics as JSON, a figure, and an interactive page."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from .. import plots
from ..folders import check_writable, write_text
from ..messages import one_line
from ..modeling_attnres import AttnResForCausalLM
from .ablation import Ablation, ablate, passes
from .depth_weights import KINDS, DepthWeights, depth_weights
from .page import render
from .text import printable, read_pieces, tokens_of

STDIN = "-"
CONTROL_DRAWS = 3  # of an ablation


def inspect(
    models: Mapping[str, str | os.PathLike],
    text: str | os.PathLike,
    out: str | os.PathLike,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    keep_tokens: int = 64,
    dtype: str = "auto",
    device: str | None = None,
    ablation_tokens: int | None = None,
    progress: bool = False,
) -> tuple[list[DepthWeights], list[Path]]:
    """Measures the depth weights of AttnRes checkpoints over a text, one after the other, and writes the results.

    Args:
        models: folders of checkpoints by the names that the results give them.
        text: UTF-8 file, or "-" for standard input.
        out: folder for depth-weights.json (depth-weights-2.json, ... for further models), .png and .html; created if
            needed.
        context, max_tokens, keep_tokens: as in `depth_weights`.
        dtype: "auto" (as in the checkpoint), "float32", "bfloat16" or "float16".
        device: name of a torch device (default: a GPU if there is one).
        ablation_tokens: number of first tokens for an ablation (`ablation.ablate`), which is written to ablation.json
            and ablation.png (ablation-2.json, ... for further models); None for no ablation.
        progress: whether to show a progress bar on stderr.

    Returns:
        The measurements and the paths of the files.

    Raises:
        ValueError, OSError: a model, the text or an option cannot be used; no file has been written.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _explained(f"--device {device}: torch cannot use it"):
        torch.empty(1, device=device)
    for name, folder in models.items():
        _check_checkpoint(name, Path(folder))
    out = Path(os.path.abspath(out))
    check_writable(out)
    found, effects = [], []
    text_name = "standard input" if str(text) == STDIN else Path(text).name
    options = {"context": context, "max_tokens": max_tokens, "keep_tokens": keep_tokens, "text_name": text_name}
    bar = partial(tqdm, leave=False, disable=not progress)
    with _rereadable(text) as path:
        for name, folder in models.items():
            with _explained(f"{name}: cannot be loaded"):
                model = AttnResForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            with _explained(f"{name}: no tokenizer can be loaded from its folder"):
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                if len(tokenizer) == 0:
                    raise ValueError("it has no tokens")
            with _open(path) as file, bar(desc=name, unit="token", total=max_tokens) as shown:
                pieces = read_pieces(file, text_name)
                weights = depth_weights(model, tokenizer, pieces, name=name, progress=shown.update, **options)
            found.append(weights)
            if ablation_tokens is not None:
                with _open(path) as file:
                    stream = tokens_of(tokenizer, read_pieces(file, text_name))
                    ids = [id for id, _ in islice(stream, min(ablation_tokens, context or ablation_tokens))]
                total = passes([mixture.num_sources for mixture in weights.mixtures], CONTROL_DRAWS)
                with bar(desc=f"{name} without", unit="pass", total=total) as shown:
                    inputs = torch.tensor([ids])
                    effects.append(ablate(model, inputs, draws=CONTROL_DRAWS, name=name, progress=shown.update))
            del model  # frees the memory before the next one is loaded
    return found, _write(found, effects, out)


def named(models: Sequence[str], folders: Sequence[str | os.PathLike]) -> dict[str, str | os.PathLike]:
    """Names folders without revealing paths of this machine: by their last part, or by the hub id as it is."""
    result: dict[str, str | os.PathLike] = {}
    for model, folder in zip(models, folders, strict=True):
        path = os.path.abspath(os.path.expanduser(model))
        name = base = printable(os.path.basename(path) if os.path.exists(path) else model)
        number = 1
        while name in result:
            number += 1
            name = f"{base} ({number})"
        result[name] = folder
    return result


def _write(found: list[DepthWeights], effects: list[Ablation], out: Path) -> list[Path]:
    """Writes all files, each one atomically, and returns their paths."""
    suffixes = ["", *(f"-{number}" for number in range(2, len(found) + 1))]
    written = [out / f"depth-weights{suffix}.json" for suffix in suffixes]
    for path, weights in zip(written, found, strict=True):
        weights.save(path)
    figure, page = out / "depth-weights.png", out / "depth-weights.html"
    plots.depth_panels(figure, [panels(weights) for weights in found])
    write_text(page, render(found, effects))
    written += [figure, page]
    for suffix, weights, effect in zip(suffixes, found, effects, strict=False):  # no effects without an ablation
        written += [out / f"ablation{suffix}.json", out / f"ablation{suffix}.png"]
        effect.save(written[-2])
        plots.source_effects(written[-1], _effect_panels(weights, effect))
    return written


def panels(weights: DepthWeights) -> dict:
    """Returns the mean weights of one model in the form that `plots.depth_panels` takes."""
    rows = [mixture.mean for mixture in weights.mixtures]
    return {"title": f"{weights.model}: {weights.description}", "columns": weights.short_sources, "rows": rows}


def _effect_panels(weights: DepthWeights, effect: Ablation) -> dict:
    """Returns an ablation in the form that `plots.source_effects` takes: the control in a column of its own."""
    columns = [*weights.short_sources, "", "random"]
    rows = []
    for changes, draws in zip(effect.without, effect.control, strict=True):
        control = sum(draws) / len(draws) if draws else None
        rows.append([*changes, *[None] * (len(columns) - 1 - len(changes)), control])
    title = f"loss without a source, {effect.tokens:,} tokens of {weights.text}, loss {effect.loss:.3f} nats per token"
    return {"title": f"{effect.model}: {title}", "columns": columns, "rows": rows}


def as_markdown(weights: DepthWeights) -> str:
    """Returns the summary numbers as a table for the terminal."""
    summary = weights.summary()
    lines = [
        f"# {weights.model}",
        "",
        f"{weights.description}, {weights.context} at a time",
        "",
        "| mixtures | on newest source | on embedding | entropy (nats) | effective sources | ignoring a source |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, values in summary["overall"].items():
        label = f"before {KINDS[kind]}" if kind in ("attention", "mlp") else kind
        lines.append(
            f"| {label} | {values['newest']:.3f} | {values['embedding']:.3f} | {values['entropy']:.3f} "
            f"| {values['effective_sources']:.2f} | {values['ignoring']} of {values['mixtures']} |"
        )
    lines += ["", f"Means over mixtures of two sources or more. A source is ignored: {summary['ignored_rule']}."]
    return "\n".join(lines) + "\n"


def _check_checkpoint(name: str, folder: Path):
    """Checks from config.json alone that a checkpoint has depth weights, before anything is loaded."""
    with _explained(f"{name}: no folder with a valid config.json; name a transformers checkpoint"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    if kind != AttnResForCausalLM.config_class.model_type:
        raise ValueError(
            f"{name}: model_type must be 'attnres', got {repr(kind)[:80]}; inspect the result of `attnres convert`, "
            "whose depth weights are uniform until it is trained if the checkpoint was a plain one."
        )


@contextmanager
def _explained(message: str) -> Iterator[None]:
    """Turns any error inside the block into a ValueError of one line: damaged files can fail anywhere in a library."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message} ({one_line(error)}).") from None


@contextmanager
def _rereadable(text: str | os.PathLike) -> Iterator[Path]:
    """Yields a file that can be read once per model: standard input and pipes are first copied to a temporary file."""
    from_stdin = str(text) == STDIN
    if not from_stdin and Path(text).is_file():
        yield Path(text)
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        with nullcontext(sys.stdin.buffer) if from_stdin else open(text, "rb") as file, path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        yield path


def _open(path: Path):
    return path.open(encoding="utf-8-sig", newline="")
