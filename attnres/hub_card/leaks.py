"""Finds what must not be uploaded: access tokens, private keys, and paths of the machine that built the folder."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..messages import one_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SHOWN = 8  # leading characters of a finding: enough to look it up, too few to use it

# A path right after a word, a dot or a slash is part of a web address or of another path.
_ALONE = r"(?<![\w.~/-])"
PATTERNS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a path of a home folder": _ALONE
    + r"/(?:home|Users|root)/[\w.-]+|\b[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2}[^\s\"'\\/]+",
    "a _name_or_path": r"\"_name_or_path\"\s*:\s*\"[^\"]+\"",
}


def check_folder(folder: Path, private: tuple[Path, ...] = ()):
    """Checks that nothing in a folder must stay private, and that none of its files is a pickle."""
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    if found := [*(f"{name}: a pickle can run code" for name in pickles), *find_leaks(folder, private)]:
        raise ValueError(f"not fit to be published: {'; '.join(found)}.")


def find_leaks(folder: Path, private: tuple[Path, ...] = ()) -> list[str]:
    """Searches every file and returns one line per finding, with no more than the first characters of a secret.

    Args:
        folder: folder to search; in weight files only the metadata are read.
        private: further paths of this machine that must not appear, besides the home and the temporary folder.
    """
    patterns = PATTERNS | {
        what: _ALONE + re.escape(str(path)) + r"[\\/][\w.]"
        for what, path in (
            ("a path of this home folder", Path.home()),
            ("a path of this temporary folder", tempfile.gettempdir()),
        )
    }
    for path in map(Path.resolve, private):
        if len(path.parts) > 2:  # "/" and "/data" are no secret and occur in many texts
            patterns[f"the path of {path.name}"] = re.escape(str(path)) + r"(?![\w-])"
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        texts = list(_texts(path))
        for what, pattern in patterns.items():
            match = next((match for text in texts if (match := re.search(pattern, text))), None)
            if match:
                found.append(f"{path.relative_to(folder).as_posix()}: {what} ({match[0][:SHOWN]}...)")
    return found


def _texts(path: Path) -> Iterator[str]:
    """Yields the content of a file and, for JSON, the content with its escapes resolved."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as weights:
                text = json.dumps(weights.metadata())
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or a damaged one ({one_line(error)}).") from None
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
    yield text
    if path.suffix in (".json", ".safetensors"):
        try:
            yield json.dumps(json.loads(text), ensure_ascii=False).replace("\\\\", "\\")
        except ValueError:
            yield text.replace("\\/", "/")
