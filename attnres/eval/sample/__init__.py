"""The data of the `sample` suite: original miniature items in the schemas of the paper's fifteen data sets.

Each file in items/ holds one data set: the rows of each config and split, one per line (for GPQA only the columns that
matter here). A split that is the same in all configs is stored once, under `shared`; the configs then have its name
instead of rows. `root` writes the data sets as a mirror of the hub, which lm-eval's own task definitions read: the same
bytes on every machine.
"""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from ..mirror import README, card

ITEMS = Path(__file__).parent / "items"
MARK = "sample-items"  # an empty file in the mirror, by which results on these items are marked


@cache
def root() -> Path:
    """Writes the mirror to a temporary folder, which is deleted when this process ends, and returns the folder."""
    folder = Path(tempfile.mkdtemp(prefix="attnres-sample-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, content in files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / MARK).touch()
    return folder


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
