"""Builds a Hub folder from a checkpoint. The folder appears only when all of its contents have passed their checks."""

import os
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_attnres import AttnResConfig
from ..conversion.checkpoint import INDEX_NAME, Checkpoint, inside, read_checkpoint
from ..conversion.companions import COMPANIONS
from ..conversion.files import copy_file
from ..conversion.inspection import inspect_checkpoint
from ..conversion.layouts import ATTNRES, understand
from ..eval.identity import checkpoint_identity
from ..folders import replaced_folder
from ..modeling_attnres import AUTO_MAP, AttnResForCausalLM
from . import figures, usage
from .front_matter import eval_results, front_matter
from .measured import Measured, read_measured
from .provenance import REPORT, read_provenance
from .text import card_body
from .validation import README, check_folder

# What comes along beside the weights; the card is written anew, and documents of the source are not of this model.
CARRIED = (*(pattern for pattern in COMPANIONS if pattern not in ("README*", "*.md")), REPORT)
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
    """Makes a complete Hub folder: weights, tokenizer, the model's code, figures, and a card from what was measured.

    Args:
        model_folder: an AttnRes checkpoint with its tokenizer. It is not changed.
        out: folder to make.
        results: folders that `attnres eval` wrote for this checkpoint; several hold different rows.
        text: file whose depth weights are drawn (default: short texts of our own).
        dynamics: output folders of Trainers that logged training dynamics.
        license: identifier on the Hub, instead of what the checkpoint's card or licence file says.
        language: codes, instead of those of the checkpoint's card.
        base_model: hub id of what the checkpoint was converted or fine-tuned from.
        repo: hub id that the usage snippets name (default: the name of the folder).
        execute_snippets: load the model: run the snippets, draw depth weights. If not, the card says so.
        link: hard links instead of copies of the weight files: saving over the folder then changes the checkpoint.
        overwrite: replace an existing folder once the new one is complete.
        progress: say on stderr what is done.

    Returns:
        `out`.

    Raises:
        ValueError: the checkpoint, a result or a value cannot be used, or something must not be published.
        OSError: files cannot be read or written.
    """
    source, out = Path(model_folder), Path(os.path.abspath(out))
    if repo is not None:
        validate_repo_id(repo)
    _check_places(source, out)
    checkpoint = read_checkpoint(source)
    config = _attnres_config(checkpoint)
    _check_tokenizer(source)
    provenance = read_provenance(source, license, language, base_model)
    say = _speaker(progress)
    facts = inspect_checkpoint(source)
    name = repo or out.name
    with replaced_folder(out, overwrite) as folder:
        measured = Measured()
        if results:
            say("hashing the weights")
            measured = read_measured(results, str(source), checkpoint_identity(source))
        _carry(checkpoint, folder, link, progress)
        _write_code(config, folder)
        sections = {}
        code = usage.snippets(name, config.residual_mode != "standard")
        if execute_snippets:
            if config.residual_mode != "standard":
                section = figures.draw_depth_weights(folder, source, name, text, progress)
                sections["Depth weights"] = section
            say("running the usage snippets, without this package")
            usage.run(code, folder, name)
        if dynamics:
            sections["Training dynamics"] = figures.draw_dynamics(folder, dynamics)
        ran_with = f"transformers {transformers.__version__}, torch {torch.__version__}" if execute_snippets else None
        body = card_body(name, facts, config, provenance, measured, code, ran_with, sections)
        data = front_matter(name.rpartition("/")[2], facts["family"], provenance, measured.rows)
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / README)
        _write_eval_results(measured, folder)
        check_folder(folder, measured, private=(source, out, Path.cwd()))
    return out


def _check_places(source: Path, out: Path):
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(
            f"{out}: must be a different folder from the checkpoint {source}, and neither may contain the other."
        )
    # Replacing one of these, with all that is in it, is never what --overwrite was meant for.
    for kind, place in (("current", Path.cwd()), ("home", Path.home())):
        if place.resolve().is_relative_to(inner):
            raise ValueError(f"{out}: is the {kind} folder or holds it; name a new folder with --out.")


def _attnres_config(checkpoint: Checkpoint) -> AttnResConfig:
    source = understand(checkpoint)
    if source.layout != ATTNRES:
        raise ValueError(
            f"{checkpoint.folder}: is a {source.layout} checkpoint, a card needs an AttnRes one; "
            f"`attnres convert {checkpoint.folder} DST` makes it."
        )
    return source.config


def _check_tokenizer(folder: Path):
    if not any(fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in TOKENIZERS):
        raise ValueError(
            f"{folder}: has no tokenizer ({', '.join(TOKENIZERS[:3])}, ...), which users need; "
            "save it there: tokenizer.save_pretrained(folder)."
        )


def _carry(checkpoint: Checkpoint, folder: Path, link: bool, progress: bool):
    with tqdm(total=checkpoint.bytes, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        for shard in checkpoint.shards:
            copy_file(inside(checkpoint.folder, shard), folder / shard, link, bar.update)
    for path in sorted(checkpoint.folder.iterdir()):
        carried = path.name == INDEX_NAME or any(fnmatch(path.name, pattern) for pattern in CARRIED)
        if carried and inside(checkpoint.folder, path.name).is_file():
            shutil.copyfile(path, folder / path.name)


def _write_code(config: AttnResConfig, folder: Path):
    """The model's code beside a configuration that leads to it."""
    config.architectures = [AttnResForCausalLM.__name__]
    config.auto_map = dict(AUTO_MAP)
    custom_object_save(AttnResForCausalLM, folder)
    config.save_pretrained(folder)


def _write_eval_results(measured: Measured, folder: Path):
    for row, entries in eval_results(measured.rows).items():
        path = folder / ".eval_results" / f"{row}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _speaker(progress: bool):
    def say(line: str):
        if progress:
            print(line, file=sys.stderr, flush=True)

    return say
