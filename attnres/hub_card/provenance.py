"""Origin and licence of a checkpoint, as stated in its folder and never guessed."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from ..conversion.checkpoint import read_json

README, REPORT = "README.md", "conversion_report.json"
OWN_TAG = "attention-residuals"  # marks a card of this package, whose base model is that of the folder
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
# Licences known by their text; any other file is linked as it is.
LICENSE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0, January 2004",
    "mit": r"Permission is hereby granted, free of charge, to any person obtaining a copy\s+of this software and "
    r"associated documentation files",
}
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
WEB = ("https://", "http://")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


@dataclass(frozen=True)
class Provenance:
    """What is known of a checkpoint besides its tensors; None where nobody said.

    Attributes:
        license, license_name, license_link: as in the front matter of a card.
        license_from: who stated the licence, in words.
        language: codes.
        base_model: hub ids of what it was derived from.
        datasets: hub ids of what it was trained on.
        report: content of the conversion report.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_from: str = ""
    language: list[str] | None = None
    base_model: list[str] | None = None
    datasets: list[str] | None = None
    report: dict | None = None


def read_provenance(
    folder: Path,
    license: str | None = None,
    language: str | list[str] | None = None,
    base_model: str | None = None,
) -> Provenance:
    """Reads the folder's card, licence file and conversion report; what the user says goes first.

    Raises:
        ValueError: the card cannot be read, or a value is no licence, language or hub id.
    """
    stated = _front_matter(folder / README)
    if base_model is None and OWN_TAG in _strings(stated.get("tags")):
        # Any other card is that of the checkpoint which was converted: its base model is one generation too early.
        base_model = stated.get("base_model")
    for each in _strings(base_model) if base_model != "" else [""]:
        _check_id(each, folder)
    report = folder / REPORT
    return Provenance(
        **_licence(folder, stated, license),
        language=_languages(folder, stated.get("language") if language is None else language),
        base_model=_strings(base_model) or None,
        datasets=_strings(stated.get("datasets")) or None,
        report=read_json(report) if report.is_file() else None,
    )


def _front_matter(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
        stated = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: its front matter is not valid YAML ({' '.join(str(error).split())[:120]})."
        ) from None
    if stated is not None and not isinstance(stated, dict):
        raise ValueError(f"{path}: its front matter must be a mapping of keys, got {type(stated).__name__}.")
    return stated or {}


def _check_id(base_model: str, folder: Path):
    try:
        validate_repo_id(base_model)
    except ValueError as error:
        raise ValueError(
            f"{folder}: base model must be a hub id such as someone/model, got {base_model!r} ({error}); "
            "--base-model sets it."
        ) from None


def _licence(folder: Path, stated: dict, given: str | None) -> dict[str, str]:
    if given is not None:
        if not LICENSE_ID.fullmatch(given):
            raise ValueError(f"license must be an identifier of the hub such as apache-2.0 or other, got {given!r}.")
        return {"license": given, "license_from": "stated by the author of this card"}
    if isinstance(stated.get("license"), str):
        if not LICENSE_ID.fullmatch(stated["license"].lower()):
            raise ValueError(
                f"{folder / README}: license must be an identifier of the hub such as apache-2.0 or other, "
                f"got {stated['license'][:80]!r}; --license sets it."
            )
        found = {key: stated[key] for key in ("license", "license_name", "license_link") if _is_text(stated.get(key))}
        link = found.get("license_link", "")
        if link and not link.startswith(WEB) and not (folder / link).is_file():
            del found["license_link"]
        return {**found, "license_from": "taken from the card of the checkpoint"}
    name = next((name for name in LICENSE_FILES if (folder / name).is_file()), None)
    if name is None:
        return {}
    text = (folder / name).read_text(encoding="utf-8", errors="replace")
    known = next((key for key, pattern in LICENSE_TEXTS.items() if re.search(pattern, text)), None)
    if known:
        return {"license": known, "license_from": f"read from {name}"}
    return {"license": "other", "license_link": name, "license_from": f"the text in {name}"}


def _languages(folder: Path, value) -> list[str] | None:
    values = value if isinstance(value, list) else [value]
    languages = _strings(["no" if each is False else each for each in values])  # YAML reads Norwegian as a truth value
    wrong = [each for each in languages if not LANGUAGE.fullmatch(each)]
    if wrong:
        raise ValueError(
            f"{folder}: language must be codes such as en, zh or code, got {wrong[0]!r}; --language sets them."
        )
    return languages or None


def _strings(value) -> list[str]:
    return [value] if _is_text(value) else [each for each in value if _is_text(each)] if isinstance(value, list) else []


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())
