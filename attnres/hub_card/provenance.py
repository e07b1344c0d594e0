"""Origin and licence of a checkpoint, as stated in its folder and never guessed."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from ..conversion.checkpoint import read_json
from ..messages import one_line

README, REPORT = "README.md", "conversion_report.json"
OWN_TAG = "attention-residuals"  # marks cards of this package, whose base model is that of the folder
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
# Licences that are recognised by their text; the card links to any other file.
LICENSE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0, January 2004",
    "mit": r"Permission is hereby granted, free of charge, to any person obtaining a copy\s+of this software and "
    r"associated documentation files",
}
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


@dataclass(frozen=True)
class Provenance:
    """Licence, language and origin of a checkpoint; None for what is not stated."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_from: str = ""  # where the licence was stated, in words
    language: list[str] | None = None
    base_model: list[str] | None = None
    datasets: list[str] | None = None
    report: dict | None = None  # content of the conversion report


def read_provenance(
    folder: Path, license: str | None = None, language: str | list[str] | None = None, base_model: str | None = None
) -> Provenance:
    """Reads a checkpoint's card, licence file and conversion report; arguments take precedence over them."""
    stated = _front_matter(folder / README)
    if base_model is None and OWN_TAG in _strings(stated.get("tags")):
        # Any other card is that of the plain checkpoint which was converted: its base model is one generation too old.
        base_model = stated.get("base_model")
    base_models = [""] if base_model == "" else _strings(base_model)
    for each in base_models:
        try:
            validate_repo_id(each)
        except ValueError as error:
            raise ValueError(
                f"{folder}: base model must be a hub id such as someone/model, got {each!r} ({error}); "
                "--base-model sets it."
            ) from None
    report = folder / REPORT
    return Provenance(
        **_licence(folder, stated, license),
        language=_languages(folder, stated.get("language") if language is None else language),
        base_model=base_models or None,
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
        raise ValueError(f"{path}: its front matter is not valid YAML ({one_line(error, 120)}).") from None
    if stated is not None and not isinstance(stated, dict):
        raise ValueError(f"{path}: its front matter must be a mapping of keys, got {type(stated).__name__}.")
    return stated or {}


def _licence(folder: Path, stated: dict, given: str | None) -> dict[str, str]:
    """Returns the fields of `Provenance` about the licence."""
    files = [name for name in LICENSE_FILES if (folder / name).is_file()]
    if given is not None:
        _check_licence(given, "")
        return {"license": given, "license_from": "stated by the author of this card"}
    if isinstance(stated.get("license"), str):
        _check_licence(stated["license"].lower(), f"{folder / README}: ")
        found = {key: stated[key] for key in ("license", "license_name", "license_link") if _strings(stated.get(key))}
        link = found.get("license_link", "")
        if not link.startswith(("https://", "http://")) and link not in files:
            found.pop("license_link", None)
        return {**found, "license_from": "taken from the card of the checkpoint"}
    if not files:
        return {}
    text = (folder / files[0]).read_text(encoding="utf-8", errors="replace")
    for known, pattern in LICENSE_TEXTS.items():
        if re.search(pattern, text):
            return {"license": known, "license_from": f"read from {files[0]}"}
    return {"license": "other", "license_link": files[0], "license_from": f"the text in {files[0]}"}


def _check_licence(value: str, where: str):
    if not LICENSE_ID.fullmatch(value):
        raise ValueError(
            f"{where}license must be an identifier of the Hub such as apache-2.0 or other, got {value[:80]!r}; "
            "--license sets it."
        )


def _languages(folder: Path, value) -> list[str] | None:
    values = value if isinstance(value, list) else [value]
    languages = _strings(["no" if each is False else each for each in values])  # YAML reads Norwegian's "no" as false
    wrong = [each for each in languages if not LANGUAGE.fullmatch(each)]
    if wrong:
        raise ValueError(
            f"{folder}: language must be codes such as en, zh or code, got {wrong[0]!r}; --language sets them."
        )
    return languages or None


def _strings(value) -> list[str]:
    """Returns the non-blank strings in a value from YAML, which may be a list or a single one."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str) and each.strip()]
