"""The `sample` suite's data: original miniature items in the schemas of the paper's fifteen data sets.

The items lie in items/*.json. `root` writes them as a mirror of the hub, so that the task definitions that read the
real data sets read these, too. No network, no torch; the same bytes on every machine.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from .layout import files

__all__ = ["files", "root"]


def root(cache: str | Path | None = None) -> Path:
    """Writes the mirror, if it is not there yet, and returns its folder.

    Args:
        cache: folder to put it in; by default the user's cache folder, or a temporary one where that cannot be written.

    Returns:
        `cache/sample-<digest of the contents>`, in which data set ORG/NAME is the folder `ORG/NAME`.
    """
    content = files()
    total = hashlib.sha256()
    for path, data in sorted(content.items()):
        total.update(f"{path}\0{len(data)}\0".encode() + data)
    name = f"sample-{total.hexdigest()[:16]}"
    if cache is not None:
        return _write(Path(cache).expanduser().absolute() / name, content)
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    try:
        return _write(folder / "attnres" / name, content)
    except OSError:
        return _write(Path(tempfile.mkdtemp(prefix="attnres-")) / name, content)


def _write(target: Path, content: dict[str, bytes]) -> Path:
    if _complete(target, content):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: whoever looks at the same time sees all of it or nothing.
    aside = Path(tempfile.mkdtemp(prefix=".sample-", dir=target.parent))
    try:
        for path, data in content.items():
            (aside / "new" / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / "new" / path).write_bytes(data)
        if target.exists():  # damaged: a cleaner of old files may have been there
            os.replace(target, aside / "old")
        try:
            os.replace(aside / "new", target)
        except OSError:  # another process was faster
            if not _complete(target, content):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _complete(target: Path, content: dict[str, bytes]) -> bool:
    try:
        return all((target / path).read_bytes() == data for path, data in content.items())
    except OSError:
        return False
