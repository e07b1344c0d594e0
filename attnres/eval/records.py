"""Result files: written atomically, validated when read, never deleted."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

RESULT, SAMPLES, FAILURE = "result.json", "samples.jsonl", "failure.txt"
NUMBER = (int, float)
FIELDS = {
    "row": str, "title": str, "suite": str, "limit": (*NUMBER, None), "fingerprint": dict, "tasks": dict,
    "score": dict, "score.metric": str, "score.filter": str, "score.average": str, "score.n": int,
    "score.value": NUMBER, "score.stderr": (*NUMBER, None),
    "score.micro": dict, "score.micro.value": NUMBER, "score.micro.stderr": (*NUMBER, None),
    "score.macro": dict, "score.macro.value": NUMBER, "score.macro.stderr": (*NUMBER, None),
    "shots": int, "protocol": list, "versions": dict, "seeds": dict, "seeds.fewshot": int, "seeds.choices": list,
    "samples_sha256": str, "settings": dict, "model": dict, "wall_seconds": NUMBER,
    "tokens_per_second": (*NUMBER, None), "prompts_cut": int, "answers_short": int,
}  # fmt: skip


def write_json(path: Path, content) -> None:
    """JSON, so that a reader sees the old file or the new one."""
    write_text(path, [json.dumps(content, indent=2, ensure_ascii=False, default=str), "\n"])


def write_lines(path: Path, objects: Iterable) -> str:
    """JSON lines, likewise; their SHA-256."""
    return write_text(path, (json.dumps(each, ensure_ascii=False, default=str) + "\n" for each in objects))


def write_text(path: Path, pieces: Iterable[str]) -> str:
    """Text in pieces, likewise; the SHA-256 of what was written, whatever another process makes of the file later.

    Raises:
        OSError: the disk is full, or the folder cannot be written; no part of the file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                # A lone surrogate, which a tokenizer can produce, has no UTF-8.
                content = piece.encode("utf-8", errors="backslashreplace")
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def check_writable(folder: Path) -> None:
    """Says before anything is measured that a folder, or the one that it would be made in, cannot be written.

    Raises:
        OSError: so it is, and why.
    """
    while not folder.exists():
        folder = folder.parent
    with TemporaryFile(dir=folder):
        pass


def read_result(folder: Path) -> dict | None:
    """The result in a row's folder, None where there is none.

    Raises:
        ValueError: the file is there and is no result.
    """
    path = folder / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a result, but {type(content).__name__}")
    check_fields(content, FIELDS, f"{path}: not a result")
    for choice in content["protocol"]:
        if not isinstance(choice, dict) or not {"choice", "value", "origin"} <= set(choice):
            raise ValueError(f"{path}: not a result: protocol must hold choice, value, origin; got {repr(choice)[:60]}")
    if content["row"] != folder.name:
        raise ValueError(f"{path}: row must be {folder.name!r} as the folder's name, got {content['row']!r}")
    if not (folder / SAMPLES).is_file():
        raise ValueError(f"{folder / SAMPLES}: is missing beside its result")
    return content


def check_samples(folder: Path, result: dict) -> None:
    """Refuses samples that are not those which the result was computed from.

    Raises:
        ValueError: they are cut, changed, or of another evaluation that wrote into the folder at the same time.
    """
    digest = hashlib.sha256()
    with (folder / SAMPLES).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != result["samples_sha256"]:
        raise ValueError(f"{folder / SAMPLES}: not the samples that {RESULT} beside it was computed from")


def check_fields(content: dict, fields: dict, where: str) -> None:
    """Refuses a field, named with dots, that is missing, of another type or no finite number.

    Raises:
        ValueError: naming the field, its value and the types that it may have.
    """
    for name, kinds in fields.items():
        value = content
        for key in name.split("."):
            if key not in value:
                raise ValueError(f"{where}: it lacks {name}")
            value = value[key]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        finite = not isinstance(value, float) or math.isfinite(value)
        if not finite or not any(value is None if kind is None else type(value) is kind for kind in kinds):
            allowed = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: {name} must be {allowed}, got {repr(value)[:60]}")


def set_aside(folder: Path) -> Path | None:
    """Moves a row's files that no longer count into a numbered folder beside them; the folder, None without files."""
    files = [folder / name for name in (RESULT, SAMPLES, FAILURE) if (folder / name).exists()]
    if not files:
        return None
    number = 1
    while (aside := folder / f"superseded-{number}").exists():
        number += 1
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    return aside


def differences(first, second, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two fingerprints."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            found
            for key in sorted({*first, *second})
            for found in differences(first.get(key), second.get(key), f"{prefix}{key}.")
        ]
    return [] if first == second else [prefix.rstrip(".")]
