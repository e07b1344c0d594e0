"""Fetches Debian documentation packages by name and makes the text of the study from them, outside the repository.

    python -m benchmarks.study.corpus

Text files only (plain text, reStructuredText, POD, manual pages), near-duplicates removed, split by file into train,
validation and held-out; a byte-level BPE is trained on the training files. `manifest.json` says what the corpus is.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer

PACKAGES = [
    "linux-doc-6.1",
    "python3.11-doc",
    "git-doc",
    "perl-doc",
    "libssl-doc",
    "manpages",
    "manpages-dev",
    "debian-reference-en",
    "debian-policy",
    "developers-reference",
]
TEXT = re.compile(r"(\.(txt|rst|pod)|/man/man\d/[^/]+\.\d\w*?)(\.gz)?$")
MOST_BYTES = 1 << 19  # of one file: larger ones are tables
SHINGLE = 5  # words
SEEN = 0.5  # share of shingles seen before that makes a file a near-duplicate
VOCABULARY = 1024
BPE_BYTES = 8_000_000  # of training text that the merges are learned from
SPLITS = ("train", "validation", "held_out")
END = "<|endoftext|>"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnres-study"


def fetch(packages: list[str], folder: Path) -> list[dict]:
    """Downloads and unpacks packages below `folder`; returns name, version and licences of each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for package in packages:
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        archive = max(folder.glob(f"{package}_*.deb"))
        unpacked = folder / package
        subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], check=True, capture_output=True)
        version = subprocess.run(
            ["dpkg-deb", "-f", str(archive), "Version"], check=True, capture_output=True, text=True
        )
        notice = unpacked / "usr/share/doc" / package / "copyright"
        text = notice.read_text(encoding="utf-8", errors="replace") if notice.is_file() else ""
        licences = sorted(set(re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)))
        found.append({"package": package, "version": version.stdout.strip(), "licences": licences or ["see copyright"]})
    return found


def read_texts(folder: Path) -> dict[str, str]:
    """Text files below `folder` by relative path, in the order of their paths; links are not followed."""
    texts = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not TEXT.search(name) or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
        if 200 <= len(content) <= MOST_BYTES and b"\0" not in content:
            texts[name] = content.decode("utf-8", errors="replace")
    return texts


def without_near_duplicates(texts: dict[str, str]) -> dict[str, str]:
    """Texts of which less than half of the shingles occur in texts before them."""
    seen, kept = set(), {}
    for name, text in texts.items():
        words = text.split()
        shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(max(1, len(words) - SHINGLE))}
        if len(shingles & seen) < SEEN * len(shingles):
            kept[name] = text
            seen |= shingles
    return kept


def split_of(name: str) -> str:
    """Which split a file belongs to: 2 % each are validation and held-out, by a hash of its path."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100
    return "held_out" if place < 2 else "validation" if place < 4 else "train"


def build(texts: dict[str, str], folder: Path, vocabulary: int = VOCABULARY) -> dict:
    """Tokenizes texts into `folder`: `{split}.npy` (uint16), `token_bytes.npy`, `manifest.json`, which it returns."""
    kept = without_near_duplicates(texts)
    digest = hashlib.sha256()
    groups = {split: [] for split in SPLITS}
    for name, text in kept.items():
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
        groups[split_of(name)].append(text)
    if empty := [split for split in SPLITS if not groups[split]]:
        raise ValueError(f"no files in {', '.join(empty)}: {len(kept)} files are too few to split.")
    tokenizer = ByteLevelBPETokenizer()
    part = groups["train"][:: 1 + sum(map(len, groups["train"])) // BPE_BYTES]
    tokenizer.train_from_iterator(part, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    tokens = {}
    for split, group in groups.items():
        encoded = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(group)]
        np.save(folder / f"{split}.npy", np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded]))
        tokens[split] = sum(map(len, encoded))
    lengths = [len(tokenizer.id_to_token(i)) if i else 0 for i in range(tokenizer.get_vocab_size())]
    np.save(folder / "token_bytes.npy", np.array(lengths))  # byte-level: a character of a token stands for a byte
    manifest = {
        "sha256": digest.hexdigest(),
        "files": len(kept),
        "near_duplicates_removed": len(texts) - len(kept),
        "bytes": sum(len(text.encode()) for text in kept.values()),
        "tokens": tokens,
        "vocabulary": len(lengths),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder() / "corpus", help="folder to make")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists; remove it to build the corpus again.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    downloads = options.out.parent / "packages"
    try:
        packages = fetch(PACKAGES, downloads)
    except FileNotFoundError as error:
        parser.error(f"this needs apt-get and dpkg-deb, as on Debian 12 ({error}).")
    except subprocess.CalledProcessError as error:
        said = error.stderr if isinstance(error.stderr, str) else (error.stderr or b"").decode(errors="replace")
        fix = (
            "run `apt-get update` first, on Debian 12"
            if error.cmd[0] == "apt-get"
            else "delete that file and try again"
        )
        parser.error(f"`{' '.join(error.cmd)}` failed: {' '.join(said.split())[-200:]}; {fix}.")
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        folder = Path(scratch) / "corpus"
        folder.mkdir()
        manifest = build(read_texts(downloads), folder) | {"packages": packages}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        folder.rename(options.out)
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
