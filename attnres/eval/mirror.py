"""Data sets from a local mirror of the hub: `ROOT/<org>/<name>/` with data files and a README.md that lists configs.

lm-eval's own task definitions run unchanged, but for where their data come from (its option `custom_dataset`). fetch.py
builds such a mirror where there is a network.
"""

import csv
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

README = "README.md"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
READ_IN_MEMORY = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


class MissingData(ValueError):
    """A data set, config or file that the mirror does not have; names what is expected and where."""


class Mirror:
    """A folder laid out as `<org>/<name>/` per data set."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        self._configs: dict[str, dict[str, dict]] = {}
        self._digests: dict[tuple[str, str | None], str] = {}

    def folder(self, repository: str) -> Path:
        """Where a data set is.

        Raises:
            MissingData: it is not there.
        """
        folder = self.root / repository
        if not folder.is_dir():
            raise MissingData(
                f"{repository} is not in {self.root}: expected the folder {folder} with its data files and a {README} "
                "whose front matter lists configs (attnres eval --fetch-only builds it)"
            )
        return folder

    def load(self, repository: str, name: str | None = None, split: str | None = None, **_):
        """What `datasets.load_dataset` returns, read into memory: no cache is written anywhere."""
        import datasets

        where = f"{repository}{f', config {name!r}' if name else ''} in {self.root / repository}"
        files = self.files(repository, name)
        if split is not None and split not in files:
            raise _no_split(where, split, files)
        splits = {}
        for each, paths in files.items():
            parts = [_read(path) for path in paths]
            splits[each] = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
            if not len(splits[each]):
                raise MissingData(f"{where}: its split {each!r} has no items; fill {paths[0]} or leave the split out")
        return splits[split] if split else _splits(splits, where)

    def files(self, repository: str, name: str | None = None) -> dict[str, list[Path]]:
        """The data files of one config by split, as the front matter of the README says."""
        folder = self.folder(repository)
        if repository not in self._configs:
            configs = {str(config.get("config_name", "default")): config for config in _front_matter(folder)}
            self._configs[repository] = configs
        configs = self._configs[repository]
        if name is None:
            chosen = next((config for config in configs.values() if config.get("default")), None)
            chosen = chosen or configs.get("default") or next(iter(configs.values()))
        elif name in configs:
            chosen = configs[name]
        else:
            raise MissingData(
                f"{repository} has no config {name!r}: expected it under configs in {folder / README}, "
                f"which has {', '.join(list(configs)[:8])}"
            )
        return {split: _matching(folder, pattern) for split, pattern in _patterns(chosen.get("data_files"), folder)}

    def digest(self, repository: str, name: str | None = None) -> str:
        """SHA-256 over the contents of a config's files, so that a result knows which items it was measured on."""
        key = (repository, name)
        if key not in self._digests:
            total = hashlib.sha256()
            for split, paths in sorted(self.files(repository, name).items()):
                for path in paths:
                    total.update(f"{split}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
            self._digests[key] = total.hexdigest()
        return self._digests[key]


@contextmanager
def serving_metrics(offline: bool, code_metric: Callable[[], object] | None = None) -> Iterator[None]:
    """`evaluate.load("code_eval")` from the sandbox: two of lm-eval's tasks load it when they are imported.

    Args:
        offline: refuse all other metrics, which would come from the hub.
        code_metric: makes the metric that runs programs; without it, code_eval cannot be loaded.
    """
    import evaluate

    metric_from_hub = evaluate.load

    def load_metric(path, *args, **options):
        if path == "code_eval":
            if code_metric is None:
                raise ValueError("this task runs programs that the model wrote: it needs --allow-code-execution")
            return code_metric()
        if offline:
            raise MissingData(f"metric {path!r}: only lm-eval's own metrics are there without a network")
        return metric_from_hub(path, *args, **options)

    evaluate.load = load_metric
    try:
        yield
    finally:
        evaluate.load = metric_from_hub


def _splits(splits: dict, where: str):
    """A DatasetDict that names data set and folder where a task asks for a split that the README does not list."""
    from datasets import DatasetDict

    class Splits(DatasetDict):
        def __missing__(self, split):
            raise _no_split(where, split, self)

    return Splits(splits)


def _no_split(where: str, split: str, splits: Iterable[str]) -> MissingData:
    return MissingData(
        f"{where}: has no split {split!r}, which the task reads; its {README} lists {', '.join(map(str, splits))}"
    )


def _front_matter(folder: Path) -> list[dict]:
    """The `configs:` of a data set's card."""
    readme = folder / README
    if not readme.is_file():
        raise MissingData(f"{readme} is missing: its front matter must list configs")
    try:
        parts = readme.read_text(encoding="utf-8").split("---\n", 2)
        content = yaml.load(parts[1], _LOADER) if len(parts) == 3 and not parts[0].strip() else None
    except UnicodeDecodeError as error:
        raise MissingData(f"{readme}: must be text in UTF-8 ({error.reason} at byte {error.start})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise MissingData(f"{readme}: front matter is not valid YAML ({' '.join(str(error).split())[:120]})") from None
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, list) or not configs or not all(isinstance(config, dict) for config in configs):
        raise MissingData(f"{readme}: front matter must have a list of configs, each with its data_files")
    return configs


def _patterns(data_files, folder: Path) -> list[tuple[str, list[str]]]:
    """(split, patterns) from the forms that the hub admits: a pattern, a list of them, a list of {split, path}."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    elif isinstance(data_files, str):
        data_files = [data_files]
    if not isinstance(data_files, list) or not data_files:
        raise MissingData(f"{folder / README}: a config has no data_files")
    if all(isinstance(entry, str) for entry in data_files):
        return [("train", data_files)]
    try:
        entries = [(str(entry["split"]), entry["path"]) for entry in data_files]
    except (TypeError, KeyError):
        raise MissingData(f"{folder / README}: data_files must be patterns or a list of split and path") from None
    found = [(split, [path] if isinstance(path, str) else path) for split, path in entries]
    for split, paths in found:
        if (
            not isinstance(split, str)
            or not isinstance(paths, list)
            or not all(isinstance(path, str) for path in paths)
        ):
            raise MissingData(
                f"{folder / README}: data_files must name a split and its paths, got {split!r}: {paths!r}"
            )
    return found


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise MissingData(f"{folder / README}: data file {pattern!r} is outside the folder")
        matches = sorted(folder.glob(pattern))
        if not matches:
            raise MissingData(f"{folder / pattern} is missing, which {README} lists")
        found += matches
    return found


def _dataset(items: list[dict]):
    """As Dataset.from_list, which takes most of a run's start to hash what is never cached."""
    from datasets import Dataset
    from pyarrow import Table

    columns = {key: [item.get(key) for item in items] for key in items[0]} if items else {}
    return Dataset(Table.from_pydict(columns), fingerprint=uuid.uuid4().hex)


def _read(path: Path):
    """One data file as a Dataset in memory."""
    from datasets import Dataset

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return Dataset(pyarrow.parquet.read_table(path), fingerprint=uuid.uuid4().hex)
        if path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8", newline="") as file:
                return _dataset(list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")))
        if path.suffix == ".jsonl":
            # Not splitlines: a text may hold U+2028, which is no end of a line in JSON.
            lines = path.read_text(encoding="utf-8").split("\n")
            return _dataset([json.loads(line) for line in lines if line.strip()])
        if path.suffix == ".json":
            return _dataset(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, AttributeError, RecursionError) as error:  # pyarrow's are ValueErrors
        raise MissingData(f"{path}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    raise MissingData(f"{path}: data files must be {', '.join(READ_IN_MEMORY)}")
