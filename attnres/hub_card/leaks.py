"""Finds what must not be uploaded: access tokens, private keys, paths of the machine that built the folder."""

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = ".safetensors"
MAX_HEADER_BYTES = 100 * 2**20  # that of safetensors itself
SHOWN = 8  # leading characters of a finding: enough to look it up, too few to use it

# A name before a path would make it a part of a web address or of another path.
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


def find_leaks(folder: Path, private: tuple[Path, ...] = ()) -> list[str]:
    """What was found, a line each: the file and what is in it, no more than the beginning of a secret.

    Args:
        folder: to search; of weight files the header is read, which has their metadata.
        private: folders of this machine whose names must not appear, besides the home and the temporary folder.
    """
    patterns = {what: re.compile(pattern) for what, pattern in PATTERNS.items()}
    patterns.update(_machine_paths(private))
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        where, texts = path.relative_to(folder).as_posix(), list(_texts(path))
        for what, pattern in patterns.items():
            match = next((match for text in texts for match in [pattern.search(text)] if match), None)
            if match:
                found.append(f"{where}: {what} ({match[0][:SHOWN]}...)")
    return found


def _machine_paths(private: tuple[Path, ...]) -> dict[str, re.Pattern]:
    parents = {"a path of this home folder": Path.home(), "a path of this temporary folder": tempfile.gettempdir()}
    patterns = {what: _ALONE + re.escape(str(path)) + r"[\\/][\w.]" for what, path in parents.items()}
    for path in private:
        # The root and a folder right below it are no secret, and their names are in many a text.
        if len(path.resolve().parts) > 2:
            patterns[f"the path of {path.name}"] = re.escape(str(path.resolve())) + r"(?![\w-])"
    return {what: re.compile(pattern) for what, pattern in patterns.items()}


def _texts(path: Path) -> Iterator[str]:
    """The content as text: as it is, and with what JSON may escape in it written out."""
    raw = _header(path) if path.suffix == WEIGHTS else path.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    yield text
    if path.suffix in (".json", WEIGHTS):
        try:
            yield json.dumps(json.loads(text), ensure_ascii=False).replace("\\\\", "\\")
        except (ValueError, RecursionError):
            yield text.replace("\\/", "/")


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return file.read(min(struct.unpack("<Q", length)[0], MAX_HEADER_BYTES)) if len(length) == 8 else b""
