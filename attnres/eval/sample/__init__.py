"""The data of the `sample` suite: original miniature items in the schemas of the paper's fifteen data sets.

Each file in items/ holds one data set: the rows of each config and split, one per line (for GPQA only the columns that
matter here). A split that is the same in all configs is stored once, under `shared`; the configs then have its name
instead of rows. `root` writes the data sets as a mirror of the hub, which lm-eval's own task definitions read: the same
bytes on every machine.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from ...folders import write_text
from ..mirror import README, card

ITEMS = Path(__file__).parent / "items"


def root(cache: str | Path | None = None) -> Path:
    """Writes the files of the mirror that are not there or differ, and returns its folder.

    Args:
        cache: the folder to put it in; by default the user's cache folder, or a temporary folder if the user's cache
            folder cannot be written.

    Returns:
        `cache/sample-<digest of the contents>`, which holds the data set ORG/NAME in the folder `ORG/NAME`.
    """
    content = files()
    total = hashlib.sha256()
    for path, data in sorted(content.items()):
        total.update(f"{path}\0{len(data)}\0".encode() + data)
    name = f"sample-{total.hexdigest()[:16]}"
    if cache is not None:
        return _write(Path(cache).expanduser().absolute() / name, content)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        return _write(Path(base) / "attnres" / name, content)
    except OSError:
        return _write(Path(tempfile.mkdtemp(prefix="attnres-")) / name, content)


def files() -> dict[str, bytes]:
    """Returns the contents of all files of the mirror by their path below its root."""
    found = {}
    for path in sorted(ITEMS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        repository, configs = data["repository"], data["configs"]
        places = {
            config: {split: f"data/{config}/{split}.jsonl" for split in splits} for config, splits in configs.items()
        }
        found[f"{repository}/{README}"] = card(
            places, f"Items of attnres's own in the schema of {repository}."
        ).encode()
        for config, splits in configs.items():
            for split, rows in splits.items():
                rows = data["shared"][rows] if isinstance(rows, str) else rows
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                found[f"{repository}/{places[config][split]}"] = lines.encode()
    return found


def _write(target: Path, content: dict[str, bytes]) -> Path:
    for path, data in content.items():
        file = target / path
        if not file.is_file() or file.read_bytes() != data:
            write_text(file, data.decode())
    return target
