"""Copies and links the files of a checkpoint: weights, and what lies beside them."""

import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from .checkpoint import CONFIG_NAME, inside

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
