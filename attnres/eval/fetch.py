"""Builds a mirror of the suites' data sets from the hub, for machines without a network."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from .loading import task_configs
from .mirror import README, Mirror
from .suites import Row

SCRIPT_REVISION = "refs/convert/parquet"  # the hub's own conversion of data sets that come as a loading script


def fetch(rows: Iterable[Row], root: str | Path) -> dict[str, str]:
    """Downloads what the rows need into `root`, and says what could not be had.

    A data set appears in the mirror when all its configs are there; one that is there already is left alone.

    Returns:
        the reason per data set that is missing.
    """
    mirror, wanted, missing = Mirror(root), {}, {}
    for row in rows:
        for config in task_configs(row):
            wanted.setdefault(config["dataset_path"], {})[config.get("dataset_name")] = None
    for repository, names in wanted.items():
        if _complete(mirror, repository, names):
            print(f"{repository}: is there", file=sys.stderr)
            continue
        try:
            how = _fetch_one(mirror.root, repository, list(names))
            print(f"{repository}: {len(names)} configs{how}", file=sys.stderr)
        except (OSError, ValueError, RuntimeError) as error:
            missing[repository] = _reason(repository, error)
            print(f"{repository}: {missing[repository]}", file=sys.stderr)
    return missing


def _complete(mirror: Mirror, repository: str, names) -> bool:
    try:
        return all(mirror.files(repository, name) for name in names)
    except ValueError:
        return False


def _fetch_one(root: Path, repository: str, names: list[str | None]) -> str:
    import datasets

    target, how = root / repository, ""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    configs = []
    try:
        for name in names:
            try:
                splits = datasets.load_dataset(repository, name)
            except RuntimeError as error:
                # datasets 4 no longer runs loading scripts (MGSM, CMMLU); the hub keeps a converted copy.
                if "script" not in str(error):
                    raise
                splits = datasets.load_dataset(repository, name, revision=SCRIPT_REVISION)
                how = ", converted from a loading script by the hub"
            label = name or "default"
            files = []
            for split, data in splits.items():
                (partial / label).mkdir(exist_ok=True)
                data.to_parquet(partial / label / f"{split}.parquet")
                files.append({"split": split, "path": f"{label}/{split}.parquet"})
            configs.append({"config_name": label, "data_files": files})
        front = yaml.safe_dump({"configs": configs}, allow_unicode=True, sort_keys=False)
        (partial / README).write_text(f"---\n{front}---\nCopy of {repository} from the hub.\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return how


def _reason(repository: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "gated" in text.lower() or "401" in text or "403" in text:
        page = f"huggingface.co/datasets/{repository}"
        return f"is gated: accept its terms at {page} and log in (hf auth login, or HF_TOKEN)"
    return text[:200] or type(error).__name__
