"""Builds a Hub folder from a checkpoint. The folder appears only when all of its contents have passed their checks."""

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from ..conversion.checkpoint import INDEX_NAME, Checkpoint, inside, read_checkpoint
from ..conversion.files import COMPANIONS, check_apart, copy_file, write_code
from ..conversion.inspection import inspect_checkpoint
from ..conversion.layouts import ATTNRES, understand
from ..eval.identity import checkpoint_identity
from ..folders import replaced_folder, write_text
from ..messages import say
from . import figures, usage
from .card import model_card
from .front_matter import eval_results
from .leaks import check_folder
from .measured import read_measured
from .provenance import README, REPORT, read_provenance

# Copied beside the weights. The card is written anew, and other documents of the source describe another model.
CARRIED = (INDEX_NAME, REPORT, *(pattern for pattern in COMPANIONS if pattern not in ("README*", "*.md")))
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenization_*.py")


def build(
    model_folder: str | os.PathLike,
    out: str | os.PathLike,
    results: Sequence[str | os.PathLike] = (),
    *,
    text: str | os.PathLike | None = None,
    dynamics: Sequence[str | os.PathLike] = (),
    license: str | None = None,
    language: str | list[str] | None = None,
    base_model: str | None = None,
    repo: str | None = None,
    execute_snippets: bool = True,
    link: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Builds a complete Hub folder: weights, tokenizer, the model's code, figures, and a card of measured results.

    Args:
        model_folder: AttnRes checkpoint with its tokenizer; it is not changed.
        out: folder to create.
        results: folders that `attnres eval` wrote for this checkpoint; several hold different rows.
        text: UTF-8 file over which depth weights are drawn (default: short texts that come with the package).
        dynamics: output folders of Trainers that logged training dynamics.
        license: Hub identifier of the licence (default: from the checkpoint's card or licence file).
        language: language codes (default: from the checkpoint's card).
        base_model: hub id of the model that the checkpoint was converted or fine-tuned from.
        repo: hub id that the usage snippets load (default: the name of the folder).
        execute_snippets: whether to load the model, run the snippets and draw depth weights; if not, the card says so.
        link: whether to hard-link the weight files instead of copying them; saving over `out` then changes the
            checkpoint.
        overwrite: whether to replace an existing folder once the new one is complete.
        progress: whether to report progress on stderr.

    Returns:
        `out` as an absolute path.

    Raises:
        ValueError: the checkpoint, a result or an argument cannot be used, or the folder must not be published.
        OSError: a file cannot be read or written, or `out` exists and `overwrite` is false.
    """
    source, out = Path(model_folder), Path(os.path.abspath(out))
    if repo is not None:
        validate_repo_id(repo)
    check_apart(source, out)
    checkpoint = read_checkpoint(source)
    understood = understand(checkpoint)
    if understood.layout != ATTNRES:
        raise ValueError(
            f"{source}: is a {understood.layout} checkpoint, but a card needs an AttnRes one; "
            f"convert it: `attnres convert {source} DST`."
        )
    config = understood.config
    if not any(fnmatch(path.name, pattern) for path in source.iterdir() for pattern in TOKENIZERS):
        raise ValueError(
            f"{source}: has no tokenizer ({', '.join(TOKENIZERS[:3])}, ...), which users need; "
            "save it there: tokenizer.save_pretrained(folder)."
        )
    provenance = read_provenance(source, license, language, base_model)
    facts = inspect_checkpoint(source)
    name = repo or out.name
    mixes = config.residual_mode != "standard"
    rows, smoke, sections, ran_with = {}, {}, {}, None
    with replaced_folder(out, overwrite) as folder:
        if results:
            if progress:
                say("hashing the weights")
            rows, smoke = read_measured(results, source, checkpoint_identity(source))
        _carry(checkpoint, folder, link, progress)
        write_code(config, folder)
        snippets = usage.snippets(name, mixes)
        if execute_snippets:
            if mixes:
                sections["Depth weights"] = figures.draw_depth_weights(folder, source, name, text, progress)
            if progress:
                say("running the usage snippets, without this package")
            usage.run(snippets, folder, name)
            ran_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
        if dynamics:
            sections["Training dynamics"] = figures.draw_dynamics(folder, dynamics)
        card = model_card(name, facts, config, provenance, rows, smoke, snippets, ran_with, sections)
        card.save(folder / README)
        for row, entries in eval_results(rows).items():
            entry = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
            write_text(folder / ".eval_results" / f"{row}.yaml", entry)
        check_folder(folder, private=(source, out, Path.cwd()))
    return out


def _carry(checkpoint: Checkpoint, folder: Path, link: bool, progress: bool):
    """Copies or links the weights, and copies the tokenizer and the other files that travel with them."""
    with tqdm(total=checkpoint.bytes, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        for shard in checkpoint.shards:
            copy_file(inside(checkpoint.folder, shard), folder / shard, link, bar.update)
    for path in sorted(checkpoint.folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in CARRIED) and inside(checkpoint.folder, path.name).is_file():
            shutil.copyfile(path, folder / path.name)
