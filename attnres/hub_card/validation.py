"""Checks that a finished folder must pass before it appears and before it is uploaded. Works offline."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from ..messages import one_line
from .leaks import find_leaks

README = "README.md"
REQUIRED = ("library_name", "pipeline_tag", "tags")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# The brackets keep these words out of searches of this repository for unfinished work.
PLACEHOLDERS = re.compile(
    r"\[More Information Needed\]|\{\{|\}\}|\bT[O]DO\b|\bFIX[M]E\b|\bTBD\b|lorem ipsum|<your[ _-]|\[your[ _-]",
    re.IGNORECASE,
)
LINK = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def check_folder(folder: Path, private: tuple[Path, ...] = ()) -> None:
    """Checks the card, the results, the code and the files of a folder.

    Args:
        folder: folder to check.
        private: folders of this machine whose paths must not appear.

    Raises:
        ValueError: the folder must not be published; the message lists every problem on one line.
    """
    problems = [
        *_card(folder),
        *_eval_results(folder),
        *_code(folder),
        *(f"{path.name}: a pickle can run code" for path in folder.iterdir() if path.suffix in PICKLES),
        *find_leaks(folder, private),
    ]
    if problems:
        raise ValueError(f"not fit to be published: {'; '.join(problems)}.")


def _card(folder: Path) -> list[str]:
    try:
        card = ModelCard.load(folder / README)
    except (ValueError, OSError, yaml.YAMLError) as error:
        return [f"{README}: cannot be read back ({one_line(error)})"]
    data = card.data.to_dict()
    links = set(LINK.findall(card.text))
    if "://" not in data.get("license_link", "://"):
        links.add(data["license_link"])
    missing = sorted(link for link in links if not (folder / link).is_file())
    return [
        *(f"{README}: its front matter lacks {key}" for key in REQUIRED if not data.get(key)),
        *(f"{README}: has the placeholder {found!r}" for found in sorted(set(PLACEHOLDERS.findall(card.content)))),
        *(f"{README}: links to {link}, which is not in the folder" for link in missing),
    ]


def _eval_results(folder: Path) -> list[str]:
    problems = []
    for path in sorted((folder / ".eval_results").glob("*")):
        try:
            parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            problems.append(f".eval_results/{path.name}: cannot be read back ({one_line(error, 100)})")
    return problems


def _code(folder: Path) -> list[str]:
    """Checks that the files named by `auto_map`, and those that they import, are in the folder."""
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not isinstance(auto_map, dict) or "AutoModelForCausalLM" not in auto_map:
        return ["config.json: its auto_map names no AutoModelForCausalLM"]
    wanted, seen = {str(each).partition(".")[0] for each in auto_map.values()}, set()
    while new := wanted - seen:
        seen |= new
        for path in (folder / f"{name}.py" for name in new):
            if path.is_file():
                wanted |= set(re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))
    missing = sorted(f"{name}.py" for name in wanted if not (folder / f"{name}.py").is_file())
    return [f"{name}: missing, the model's code needs it" for name in missing]
