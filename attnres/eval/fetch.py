"""Builds a mirror of the suites' data sets from the hub, for machines without a network."""

from collections.abc import Iterable
from pathlib import Path

from ..folders import replaced_folder
from ..messages import one_line, say
from .loading import task_configs
from .mirror import README, Mirror, card
from .suites import Row

SCRIPT_REVISION = "refs/convert/parquet"  # the hub's own conversion of data sets that come as a loading script


def fetch(rows: Iterable[Row], root: str | Path) -> dict[str, str]:
    """Downloads the data sets of the rows into `root` and returns, for each that is missing, the reason.

    A data set appears in the mirror when all its configs are there; a complete one is left alone.
    """
    mirror, wanted, missing = Mirror(root), {}, {}
    for row in rows:
        for config in task_configs(row):
            wanted.setdefault(config["dataset_path"], {})[config.get("dataset_name")] = None
    for repository, names in wanted.items():
        try:
            if _is_complete(mirror, repository, names):
                say(f"{repository}: is already there")
            else:
                note = _download(mirror.root, repository, names)
                say(f"{repository}: {len(names)} configs{note}")
        except (OSError, ValueError, RuntimeError) as error:
            missing[repository] = one_line(error, 400)
            say(f"{repository}: {missing[repository]}")
    return missing


def _is_complete(mirror: Mirror, repository: str, names: Iterable[str | None]) -> bool:
    try:
        return all(mirror.files(repository, name) for name in names)
    except ValueError:
        return False


def _download(root: Path, repository: str, names: Iterable[str | None]) -> str:
    """Downloads the configs of a data set and returns a note on where they came from, for the progress message."""
    import datasets

    note, configs = "", {}
    with replaced_folder(root / repository, overwrite=True) as folder:
        for name in names:
            try:
                splits = datasets.load_dataset(repository, name)
            except RuntimeError as error:
                # datasets 4 no longer runs loading scripts (MGSM, CMMLU); the hub keeps a converted copy.
                if "script" not in str(error):
                    raise
                splits = datasets.load_dataset(repository, name, revision=SCRIPT_REVISION)
                note = ", converted from a loading script by the hub"
            label = name or "default"
            (folder / label).mkdir()
            configs[label] = {split: f"{label}/{split}.parquet" for split in splits}
            for split, data in splits.items():
                data.to_parquet(folder / configs[label][split])
        (folder / README).write_text(card(configs, f"Copy of {repository} from the hub."))
    return note
