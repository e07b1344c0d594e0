"""Checks that a finished folder must pass. Works offline."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from ..eval.suites import ROWS
from .front_matter import DATA_SETS, shown_value
from .leaks import find_leaks
from .measured import Measured

README = "README.md"
REQUIRED = ("library_name", "pipeline_tag", "tags")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Brackets where the word itself would be found by a search for unfinished work.
PLACEHOLDERS = re.compile(
    r"\[More Information Needed\]|\{\{|\}\}|\bT[O]DO\b|\bFIX[M]E\b|\bTBD\b|lorem ipsum|<your[ _-]|\[your[ _-]",
    re.IGNORECASE,
)
_LINK = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def check_folder(folder: Path, measured: Measured | None = None, private: tuple[Path, ...] = ()) -> None:
    """Raises ValueError, one line, with everything that is wrong with a folder.

    Args:
        measured: what the card must say, to the digit; by default it is not compared.
        private: folders of this machine whose names must not appear.
    """
    problems = [
        *_card(folder, measured),
        *_eval_results(folder, measured),
        *_code(folder),
        *(f"{path.name}: a pickle can run code" for path in folder.iterdir() if path.suffix in PICKLES),
        *find_leaks(folder, private),
    ]
    if problems:
        raise ValueError(f"not fit to be published: {'; '.join(problems)}.")


def _card(folder: Path, measured: Measured | None) -> list[str]:
    try:
        card = ModelCard.load(folder / README)
    except (ValueError, OSError, yaml.YAMLError) as error:
        return [f"{README}: cannot be read back ({' '.join(str(error).split())[:200]})"]
    data = card.data.to_dict()
    problems = [f"{README}: its front matter lacks {key}" for key in REQUIRED if not data.get(key)]
    problems += [
        f"{README}: has the placeholder {found!r}" for found in sorted(set(PLACEHOLDERS.findall(card.content)))
    ]
    problems += [
        f"{README}: links to {name}, which is not in the folder"
        for name in sorted({*_LINK.findall(card.text), *_relative(data.get("license_link"))})
        if not (folder / name).is_file()
    ]
    if measured is not None:
        stated = {
            (result.dataset_type, result.dataset_config, result.metric_value) for result in card.data.eval_results or []
        }
        expected = {
            (DATA_SETS[row].id, DATA_SETS[row].config, shown_value(result)) for row, result in measured.rows.items()
        }
        if stated != expected:
            problems.append(f"{README}: its model-index does not hold the measured rows")
        titles = re.findall(r"^\| ([^|]+?) \| -?\d", _section(card.text, "Evaluation"), re.MULTILINE)
        if titles != [ROWS[row].title for row in measured.rows]:
            problems.append(f"{README}: its evaluation table does not hold the measured rows")
    return problems


def _section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _relative(link) -> list[str]:
    return [link] if isinstance(link, str) and "://" not in link else []


def _eval_results(folder: Path, measured: Measured | None) -> list[str]:
    problems, found = [], {}
    for path in sorted((folder / ".eval_results").glob("*")):
        try:
            (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
            found[entry.dataset_id, entry.task_id] = entry.value
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            problems.append(f".eval_results/{path.name}: cannot be read back ({' '.join(str(error).split())[:100]})")
    if measured is not None:
        registered = {row: result for row, result in measured.rows.items() if DATA_SETS[row].task_id}
        if found != {
            (DATA_SETS[row].id, DATA_SETS[row].task_id): shown_value(each) for row, each in registered.items()
        }:
            problems.append(".eval_results: does not hold the measured rows of registered benchmarks")
    return problems


def _code(folder: Path) -> list[str]:
    """The files that `auto_map` leads to, and those that they import."""
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not isinstance(auto_map, dict) or "AutoModelForCausalLM" not in auto_map:
        return ["config.json: its auto_map names no AutoModelForCausalLM"]
    wanted, seen = {str(each).partition(".")[0] for each in auto_map.values()}, set()
    while wanted - seen:
        name = sorted(wanted - seen)[0]
        seen.add(name)
        path = folder / f"{name}.py"
        if path.is_file():
            wanted |= set(re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))
    return [
        f"{name}.py: missing, the model's code needs it"
        for name in sorted(seen)
        if not (folder / f"{name}.py").is_file()
    ]
