"""Writes files and folders atomically: nothing half-written ever has a final name."""

import contextlib
import ctypes
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_writable(folder: str | os.PathLike):
    """Checks, before the work starts, that results can be written to a folder."""
    folder = Path(os.path.abspath(folder))
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise OSError(f"{folder}: cannot be written, because {nearest} is a file, not a folder; choose another place")
    if not os.access(nearest, os.W_OK):
        raise OSError(f"{folder}: cannot be written: no permission to write to {nearest}; choose another place")


def write_text(path: str | os.PathLike, text: str):
    """Writes a UTF-8 file under a temporary name and renames it; creates the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `folder` when the block succeeds and deleted when it fails.

    An existing folder of that name is kept until the new one is complete.

    Raises:
        FileExistsError: `folder` is not empty and `overwrite` is false, or it is or contains the current folder or the
            home folder.
    """
    for kind, place in (("current", Path.cwd()), ("home", Path.home())):
        if place.resolve().is_relative_to(folder.resolve()):
            raise FileExistsError(f"{folder}: is or holds the {kind} folder, which is never replaced; name another.")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder}: exists and is not a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder}: is not empty; --overwrite replaces it when the new one is complete.")
    check_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _wait_for_disk(path)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path):
    """Renames the new folder to its final name. An existing folder ends up under the temporary name, or deleted."""
    occupied = folder.is_dir() and any(folder.iterdir())
    if not occupied:
        temporary.rename(folder)
    elif not _exchange(temporary, folder):
        old = temporary.with_suffix(".old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    _wait_for_disk(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders atomically; returns False where the system does not support it."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        return False


def _remove_leftovers(folder: Path):
    """Deletes temporary folders of killed processes that were writing to the same folder."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        owner = re.fullmatch(r"(\d+)-[0-9a-f]{8}\.partial", path.name.removeprefix(f".{folder.name}."))
        if owner and not Path(f"/proc/{owner[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _wait_for_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
