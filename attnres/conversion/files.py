"""Copies and writes the files of a checkpoint: weights, and what lies beside them."""

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save

from ..configuration_attnres import AttnResConfig
from ..modeling_attnres import AUTO_MAP, AttnResForCausalLM
from .checkpoint import CONFIG_NAME, INDEX_NAME, CheckpointError, inside

# Tokenizer, generation configuration, licence, documentation; never weights or model code. A tokenizer's own code runs
# only where the user passes trust_remote_code.
COMPANIONS = (
    *("tokenizer*.json", "*vocab*.json", "*vocab*.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.tiktoken", "*.model", "tokenization_*.py", "chat_template*", "*.jinja"),
    *("generation_config.json", "preprocessor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "README*", "*.md"),
)


def copy_file(source: Path, target: Path, link: bool, progress: Callable[[int], object]):
    """Copies a file, or makes a hard link to it, and calls `progress` with its size."""
    if link:
        os.link(source.resolve(), target)
    else:
        shutil.copyfile(source, target)
    progress(target.stat().st_size)


def write_companions(source: Path, folder: Path):
    """Copies the companion files of a checkpoint to another folder."""
    for path in sorted(source.iterdir()):
        is_companion = any(fnmatch(path.name, pattern) for pattern in COMPANIONS) and path.name != CONFIG_NAME
        if is_companion and inside(source, path.name).is_file():
            shutil.copyfile(path, folder / path.name)


def write_index(folder: Path, weight_map: dict[str, str], size: int):
    """Writes the index of weight files with `size` bytes of tensors, given the file of every tensor."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_code(config: AttnResConfig, folder: Path):
    """Writes the model's code and a configuration that refers to it."""
    config.architectures = [AttnResForCausalLM.__name__]
    config.auto_map = dict(AUTO_MAP)
    custom_object_save(AttnResForCausalLM, folder)
    config.save_pretrained(folder)


def check_apart(source: Path, result: Path):
    """Checks that a result is neither its source nor inside it, and does not contain it."""
    inner, outer = result.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise CheckpointError(f"{result}: must be a different folder from {source}, and neither may contain the other.")
