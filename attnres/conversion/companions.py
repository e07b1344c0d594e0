"""The files copied along with a checkpoint's weights: tokenizer, generation settings, licence."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from .checkpoint import CONFIG_NAME, inside

# Tokenizer, chat template, generation configuration, licence, documentation; never weights or code, but for a
# tokenizer's own code, which runs only where somebody trusts it.
COMPANIONS = (
    "tokenizer*.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template*",
    "*.jinja",
    "*.tiktoken",
    "*.model",
    "tokenization_*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README*",
    "*.md",
)


def write_companions(source: Path, folder: Path):
    """Copies them from one folder to another."""
    for path in sorted(source.iterdir()):
        is_companion = any(fnmatch(path.name, pattern) for pattern in COMPANIONS) and path.name != CONFIG_NAME
        if is_companion and inside(source, path.name).is_file():
            shutil.copyfile(path, folder / path.name)
