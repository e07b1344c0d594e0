"""Result files: written atomically, validated when read, and never deleted."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from .. import folders
from ..messages import one_line

RESULT, SAMPLES, FAILURE = "result.json", "samples.jsonl", "failure.txt"
FIELDS = (
    "row", "title", "suite", "limit", "fingerprint", "tasks", "score", "score.metric", "score.filter", "score.average",
    "score.n", "score.value", "score.stderr", "score.micro", "score.macro", "shots", "protocol", "versions", "seeds",
    "samples_sha256", "settings", "model", "wall_seconds", "tokens_per_second", "prompts_cut", "answers_short",
)  # fmt: skip


def write_json(path: Path, content) -> None:
    """Writes a JSON file atomically."""
    write_text(path, [json.dumps(content, indent=2, ensure_ascii=False, default=str), "\n"])


def write_lines(path: Path, objects: Iterable) -> str:
    """Writes a file of JSON lines atomically and returns its SHA-256."""
    return write_text(path, (json.dumps(each, ensure_ascii=False, default=str) + "\n" for each in objects))


def write_text(path: Path, pieces: Iterable[str]) -> str:
    """Joins pieces of text, writes them atomically and returns the SHA-256 of the file.

    Raises:
        OSError: the disk is full, or the folder cannot be written; no part of the file is left behind.
    """
    # A tokenizer can produce lone surrogates, which have no UTF-8.
    content = "".join(pieces).encode("utf-8", errors="backslashreplace")
    folders.write_text(path, content.decode())
    return hashlib.sha256(content).hexdigest()


def read_result(folder: Path) -> dict | None:
    """Reads the result in a row's folder; None if there is none."""
    path = folder / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error, 120)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a result: must hold a JSON object, got {type(content).__name__}")
    score = content.get("score")
    present = {*content, *(f"score.{name}" for name in (score if isinstance(score, dict) else ()))}
    if missing := [name for name in FIELDS if name not in present]:
        raise ValueError(f"{path}: not a result: it lacks {', '.join(missing)}")
    if content["row"] != folder.name:
        raise ValueError(f"{path}: row must be {folder.name!r}, the name of the folder, got {content['row']!r}")
    if not (folder / SAMPLES).is_file():
        raise ValueError(f"{folder / SAMPLES}: is missing beside its result")
    return content


def check_samples(folder: Path, result: dict) -> None:
    """Checks that a row's samples are those that its result was computed from."""
    if hashlib.sha256((folder / SAMPLES).read_bytes()).hexdigest() != result["samples_sha256"]:
        raise ValueError(f"{folder / SAMPLES}: not the samples that {RESULT} beside it was computed from")


def set_aside(folder: Path) -> None:
    """Moves the files of an outdated result into a numbered folder beside them."""
    files = [folder / name for name in (RESULT, SAMPLES, FAILURE) if (folder / name).exists()]
    if not files:
        return
    number = 1
    while (aside := folder / f"superseded-{number}").exists():
        number += 1
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)


def differences(first, second, prefix: str = "") -> list[str]:
    """Returns the dotted names of the fields in which two fingerprints differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            found
            for key in sorted({*first, *second})
            for found in differences(first.get(key), second.get(key), f"{prefix}{key}.")
        ]
    return [] if first == second else [prefix.rstrip(".")]
