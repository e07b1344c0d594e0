"""Reads data sets from a local mirror of the hub: folders `ROOT/<org>/<name>/` with data files and a README.md.

The README.md lists the configs in its front matter, as on the hub. lm-eval's own task definitions run unchanged: only
their option `custom_dataset` is set. fetch.py builds such a mirror on a machine with a network.
"""

import csv
import hashlib
import io
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ..messages import one_line

README = "README.md"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast


class MissingData(ValueError):
    """A data set, config, split or file is missing or damaged; the message names what is expected and where."""


class Mirror:
    """A folder that holds each data set `<org>/<name>` in a folder of that path."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        self._configs: dict[str, dict[str, dict]] = {}

    def load(self, repository: str, name: str | None = None):
        """Reads a config into memory as a `datasets.DatasetDict`, without the caches of `datasets.load_dataset`.

        Raises MissingData if something is missing or cannot be read.
        """
        import pyarrow
        from datasets import Dataset, DatasetDict

        splits = DatasetDict()
        for split, paths in self.files(repository, name).items():
            table = pyarrow.concat_tables([_read(path) for path in paths], promote_options="permissive")
            # Without a fingerprint all tables would be hashed for a cache that is not used, which takes seconds.
            splits[split] = Dataset(table, fingerprint=uuid.uuid4().hex)
        return splits

    def files(self, repository: str, name: str | None = None) -> dict[str, list[Path]]:
        """Returns the files of a config (without a name, the default one) by split; MissingData if any is missing."""
        from datasets.data_files import sanitize_patterns

        folder = self.root / repository
        readme = folder / README
        if repository not in self._configs:
            if not folder.is_dir():
                raise MissingData(
                    f"{repository} is not in {self.root}: expected the folder {folder} with its data files and a "
                    f"{README} whose front matter lists configs (attnres eval --fetch-only builds it)"
                )
            listed = _front_matter(readme)
            self._configs[repository] = {str(config.get("config_name", "default")): config for config in listed}
        configs = self._configs[repository]
        if name is None:
            marked = (each for each, config in configs.items() if config.get("default") or each == "default")
            name = next(marked, next(iter(configs)))
        if name not in configs:
            raise MissingData(
                f"{repository} has no config {name!r}: expected it under configs in {readme}, "
                f"which has {', '.join(list(configs)[:8])}"
            )
        listed = configs[name].get("data_files")
        try:
            patterns = sanitize_patterns(listed).items()  # from any of the forms that the hub admits
            if any(".." in Path(each).parts for _, paths in patterns for each in paths):
                raise ValueError("a path leaves the folder")
            matches = {(split, each): sorted(folder.glob(each)) for split, paths in patterns for each in paths}
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            raise MissingData(
                f"{readme}: the data_files of a config must be paths in its folder, or a list of split and path; "
                f"got {one_line(repr(listed))}"
            ) from None
        found: dict[str, list[Path]] = {}
        for (split, pattern), paths in matches.items():
            if not paths:
                raise MissingData(f"{folder / pattern} is missing, which {README} lists")
            found[split] = found.get(split, []) + paths
        return found

    def digest(self, repository: str, name: str | None = None) -> str:
        """Returns the SHA-256 over the contents of a config's files, which identifies the items of a result."""
        total = hashlib.sha256()
        for split, paths in sorted(self.files(repository, name).items()):
            for path in paths:
                total.update(f"{split}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()


def card(configs: dict[str, dict[str, str]], text: str, **fields: str) -> str:
    """Returns a README.md whose front matter has these fields and, for each config, the path of each split's file."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configs.items()
    ]
    return f"---\n{json.dumps({**fields, 'configs': listed}, indent=1)}\n---\n{text}\n"  # JSON is YAML


@contextmanager
def serving_code_eval(metric: object) -> Iterator[None]:
    """Serves `evaluate.load("code_eval")` in the block; two of lm-eval's tasks call it when they are imported."""
    import evaluate

    metric_from_hub = evaluate.load

    def load_metric(path, *args, **options):
        return metric if path == "code_eval" else metric_from_hub(path, *args, **options)

    evaluate.load = load_metric
    try:
        yield
    finally:
        evaluate.load = metric_from_hub


def _front_matter(readme: Path) -> list[dict]:
    """Returns the `configs:` of a data set's README.md."""
    try:
        configs = yaml.load(readme.read_text(encoding="utf-8").split("---\n")[1], _LOADER)["configs"]
        if not configs or not all(isinstance(config, dict) for config in configs):
            raise ValueError("it has no configs")
    except Exception as error:  # YAML can hold anything
        raise MissingData(
            f"{readme}: cannot be read ({type(error).__name__}: {one_line(error, 120)}); its front matter must be YAML "
            "with a list of configs, each with its data_files"
        ) from None
    return configs


def _read(path: Path):
    """Reads one data file into a `pyarrow.Table`."""
    from pyarrow import Table, parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        text = path.read_bytes().decode("utf-8")  # as it is, line ends included
        if path.suffix in (".csv", ".tsv"):
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ","))
        elif path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix == ".jsonl":
            # Not splitlines: a text may hold U+2028, which does not end a line in JSON.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            raise ValueError("data files must be .jsonl, .json, .parquet, .csv or .tsv")
        return Table.from_pylist(rows)
    except Exception as error:
        raise MissingData(f"{path}: cannot be read ({one_line(error, 160)})") from None
