"""Copies the files beside a checkpoint's weights: tokenizer, generation configuration, licence, documentation."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from .checkpoint import CONFIG_NAME, inside

# Never weights or model code. A tokenizer's own code runs only where the user passes trust_remote_code.
COMPANIONS = (
    *("tokenizer*.json", "*vocab*.json", "*vocab*.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.tiktoken", "*.model", "tokenization_*.py", "chat_template*", "*.jinja"),
    *("generation_config.json", "preprocessor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "README*", "*.md"),
)


def write_companions(source: Path, folder: Path):
    """Copies the companion files of a checkpoint to another folder."""
    for path in sorted(source.iterdir()):
        is_companion = any(fnmatch(path.name, pattern) for pattern in COMPANIONS) and path.name != CONFIG_NAME
        if is_companion and inside(source, path.name).is_file():
            shutil.copyfile(path, folder / path.name)
