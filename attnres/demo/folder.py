"""A result folder that appears only when complete, and is never lost to a failed run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..folders import check_writable

MARKER = ".attnres-demo"


@contextmanager
def building(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `out` to write into, renamed to `out` when the block ends without an error.

    Args:
        out: the folder to make.
        overwrite: whether a folder that an earlier demo made may be replaced. It stays until the new one is complete.

    Raises:
        FileExistsError: `out` is in use and may not be replaced.
        OSError: its parent cannot be written.
    """
    out = Path(os.path.abspath(out))
    _check(out, overwrite)
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent))
    try:
        work.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        (work / MARKER).write_text("made by attnres demo; --overwrite may replace this folder\n", encoding="utf-8")
        yield work
        _publish(work, out, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(out: Path, overwrite: bool):
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is not a folder; choose another with --out")
    if not any(out.iterdir()):
        return
    if not (out / MARKER).is_file():
        raise FileExistsError(f"{out} is not empty and was not made by attnres demo; choose another folder with --out")
    if not overwrite:
        raise FileExistsError(f"{out} holds an earlier demo; replace it with --overwrite or choose another with --out")


def _publish(work: Path, out: Path, overwrite: bool):
    _check(out, overwrite)  # it may have been filled while the demo ran
    if not out.exists():
        work.rename(out)
        return
    old = work.with_suffix(".old")
    out.rename(old)
    try:
        work.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
