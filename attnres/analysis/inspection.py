"""Writes the depth weights of checkpoints over a text: statistics as JSON, a figure, and an interactive page."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from .. import plots
from ..folders import check_writable
from ..modeling_attnres import AttnResForCausalLM
from .ablation import Ablation, ablate, passes
from .depth_weights import KINDS, DepthWeights, depth_weights, write_text
from .page import render
from .text import printable, read_pieces, tokens_of

STDIN = "-"
CONTROL_DRAWS = 3  # of an ablation
SHOWN_SOURCES = 8  # in the list of those that are ignored


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
    """Measures the depth weights of AttnRes checkpoints over a text, one after the other, and writes what it found.

    Args:
        models: folders by the names that the result calls them.
        text: file in UTF-8, or "-" for standard input.
        out: folder for depth-weights.json (of a second model depth-weights-2.json, ...), .png and .html; made where it
            is not there.
        context, max_tokens, keep_tokens: as in `depth_weights`.
        dtype: "auto" (as in the checkpoint), "float32", "bfloat16" or "float16".
        device: as torch calls it (default: a GPU where there is one).
        ablation_tokens: measure also what each source is worth (`ablation.ablate`), on as many first tokens, and write
            ablation.json and ablation.png (of a second model ablation-2.json, ...).
        progress: show a bar on stderr.

    Returns:
        What was measured, and the files.

    Raises:
        ValueError, OSError: in one line; nothing has been written.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    for name, folder in models.items():
        _check_checkpoint(name, Path(folder))
    out = Path(os.path.abspath(out))
    check_writable(out)
    found, effects = [], []
    with _opened(text) as file:
        for name, folder in models.items():
            model = _load_model(name, folder, dtype, device)
            tokenizer = _load_tokenizer(name, folder)
            text_name = "standard input" if str(text) == STDIN else Path(text).name
            with (
                _decoded(file) as decoded,
                tqdm(
                    desc=name, unit="token", total=max_tokens, leave=False, disable=not progress, file=sys.stderr
                ) as bar,
            ):
                weights = depth_weights(
                    model,
                    tokenizer,
                    read_pieces(decoded, text_name),
                    context=context,
                    max_tokens=max_tokens,
                    keep_tokens=keep_tokens,
                    name=name,
                    text_name=text_name,
                    progress=bar.update,
                )
            found.append(weights)
            if ablation_tokens is not None:
                with _decoded(file) as decoded:
                    stream = tokens_of(tokenizer, read_pieces(decoded, text_name))
                    ids = [id for id, _ in islice(stream, min(ablation_tokens, context or ablation_tokens))]
                counts = [len(mixture.mean) for mixture in weights.mixtures]
                total = passes(counts, CONTROL_DRAWS)
                with tqdm(
                    desc=f"{name} without", unit="pass", total=total, leave=False, disable=not progress, file=sys.stderr
                ) as bar:
                    ids = torch.tensor([ids])
                    effects.append((weights, ablate(model, ids, draws=CONTROL_DRAWS, name=name, progress=bar.update)))
            del model  # before the next one is loaded
    return found, [*write(found, out, [effect for _, effect in effects]), *write_ablations(effects, out)]


def named(models: Sequence[str], folders: Sequence[str | os.PathLike]) -> dict[str, str | os.PathLike]:
    """Folders by names that tell nothing about this machine: the last part of a path, a hub id as it is."""
    result = {}
    for model, folder in zip(models, folders, strict=True):
        name = base = printable(Path(os.path.abspath(model)).name if Path(model).exists() else model)
        number = 1
        while name in result:
            number += 1
            name = f"{base} ({number})"
        result[name] = folder
    return result


def write(found: list[DepthWeights], out: str | os.PathLike, effects: Sequence[Ablation] = ()) -> list[Path]:
    """Writes the files of `inspect`, each whole or not at all, and returns their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, weights in enumerate(found, 1):
        written.append(out / ("depth-weights.json" if number == 1 else f"depth-weights-{number}.json"))
        weights.save(written[-1])
    written += [out / "depth-weights.png", out / "depth-weights.html"]
    plots.depth_panels(written[-2], [panels(weights) for weights in found])
    write_text(written[-1], render(found, effects))
    return written


def write_ablations(effects: list[tuple[DepthWeights, Ablation]], out: Path) -> list[Path]:
    """A JSON and a figure per model."""
    written = []
    for number, (weights, effect) in enumerate(effects, 1):
        stem = "ablation" if number == 1 else f"ablation-{number}"
        effect.save(out / f"{stem}.json")
        means = [sum(draws) / len(draws) if draws else None for draws in effect.control]
        plots.source_effects(
            out / f"{stem}.png",
            {
                "title": f"{effect.model}: loss without a source, {effect.tokens:,} tokens of {weights.text}, loss "
                f"{effect.loss:.3f} nats per token",
                "columns": weights.short_sources,
                "rows": [str(mixture.layer) for mixture in weights.of_kind("attention")],
                "attention": effect.without[0:-1:2],
                "mlp": effect.without[1:-1:2],
                "output": effect.without[-1],
                "attention_control": means[0:-1:2],
                "mlp_control": means[1:-1:2],
                "output_control": means[-1],
            },
        )
        written += [out / f"{stem}.json", out / f"{stem}.png"]
    return written


def panels(weights: DepthWeights) -> dict:
    """One model as `plots.depth_panels` takes it."""
    return {
        "title": f"{weights.model}: {facts(weights)}",
        "columns": weights.short_sources,
        "rows": [str(mixture.layer) for mixture in weights.of_kind("attention")],
        "attention": [mixture.mean for mixture in weights.of_kind("attention")],
        "mlp": [mixture.mean for mixture in weights.of_kind("mlp")],
        "output": weights.of_kind("output")[0].mean,
    }


def facts(weights: DepthWeights) -> str:
    """Mode, depth and text of a measurement, in one line."""
    mode = "Full AttnRes" if weights.layers_per_block is None else "Block AttnRes"
    blocks = "" if weights.layers_per_block is None else f" in blocks of {weights.layers_per_block}"
    return f"{mode}, {weights.num_layers} decoder layers{blocks}; {weights.num_tokens:,} tokens of {weights.text}"


def as_markdown(weights: DepthWeights) -> str:
    """The summary numbers as a table for the terminal."""
    summary = weights.summary()
    lines = [
        f"# {weights.model}",
        "",
        f"{facts(weights)}, {weights.context} at a time",
        "",
        "| mixtures | on newest source | on embedding | entropy (nats) | effective sources | ignoring a source |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, values in summary["overall"].items():
        lines.append(
            f"| {OVERALL[kind]} | {values['newest']:.3f} | {values['embedding']:.3f} | {values['entropy']:.3f} "
            f"| {values['effective_sources']:.2f} | {values['ignoring']} of {values['mixtures']} |"
        )
    lines += ["", f"Means over mixtures of two sources or more. A source is ignored: {summary['ignored_rule']}."]
    shares = {source: len(entry["by"]) / entry["seen_by"] for source, entry in summary["ignored"].items()}
    for source in sorted(shares, key=shares.get, reverse=True)[:SHOWN_SOURCES]:
        entry = summary["ignored"][source]
        shown = ", ".join(entry["by"][:4]) + (", ..." if len(entry["by"]) > 4 else "")
        lines.append(f"- {source}: ignored by {len(entry['by'])} of the {entry['seen_by']} that see it ({shown})")
    if len(shares) > SHOWN_SOURCES:
        lines.append(f"- and {len(shares) - SHOWN_SOURCES} more, by smaller shares of those that see them")
    if not shares:
        lines.append("- none is ignored")
    return "\n".join(lines) + "\n"


OVERALL = {**{kind: "output" if kind == "output" else f"before {name}" for kind, name in KINDS.items()}, "all": "all"}


def _check_checkpoint(name: str, folder: Path):
    """Says from config.json alone that a checkpoint has no depth weights that were learned."""
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{name}: has no config.json, so it is not a transformers checkpoint.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: its config.json is not valid JSON ({_line(error)}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{name}: config.json must hold a JSON object, got {type(config).__name__}.")
    kind = config.get("model_type")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if text.get("attn_res_block_size"):
        raise ValueError(f"{name}: is in the Kimi K3 layout; inspect the result of `attnres convert {name} DST`.")
    if kind != AttnResForCausalLM.config_class.model_type:
        raise ValueError(
            f"{name}: model_type must be 'attnres', got {repr(kind)[:80]}; a plain checkpoint has no depth weights to "
            "inspect (`attnres convert` makes an AttnRes model of it, whose weights are uniform until it is trained)."
        )
    if config.get("residual_mode") == "standard":
        raise ValueError(f"{name}: residual_mode must be 'block' or 'full', got 'standard', which mixes nothing.")


def _load_tokenizer(name: str, folder: str | os.PathLike):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        usable = len(tokenizer) > 0
    except Exception as error:  # damaged files can fail anywhere in transformers
        raise ValueError(f"{name}: no tokenizer can be loaded from its folder ({_line(error)}).") from None
    if not usable:
        raise ValueError(f"{name}: its tokenizer has no tokens; put the files of the right one into the folder.")
    return tokenizer


def _load_model(name: str, folder: str | os.PathLike, dtype: str, device: str):
    try:
        return AttnResForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    except Exception as error:  # as above
        raise ValueError(f"{name}: cannot be loaded ({_line(error)}).") from None


def _check_device(device: str):
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend has its own
        raise ValueError(f"--device {device}: torch cannot use it ({_line(error)}); such as cpu or cuda:0.") from None


@contextmanager
def _opened(text: str | os.PathLike) -> Iterator[BinaryIO]:
    """The text as a file that can be read once per model: what comes through a pipe is kept on disk meanwhile."""
    if str(text) != STDIN and Path(text).is_file():
        with open(text, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        if str(text) == STDIN:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        else:
            with open(text, "rb") as file:  # a named pipe; or what is not there, and says so
                shutil.copyfileobj(file, copy)
        yield copy


@contextmanager
def _decoded(file: BinaryIO) -> Iterator[TextIOWrapper]:
    file.seek(0)
    decoded = TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield decoded
    finally:
        decoded.detach()  # it would close the file


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
