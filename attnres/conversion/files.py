"""Copying, linking and replacing folders so that nothing half-written is ever seen under a final name."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ..folders import check_writable

FICLONE = 0x40049409  # ioctl of Linux: share the blocks of another file, copy on write
AT_FDCWD, RENAME_EXCHANGE = -100, 2
COPY_CHUNK = 64 * 2**20  # bytes between two reports of progress


def copy_range(source: int, target: int, offset: int, count: int, progress: Callable[[int], None]):
    """Appends `count` bytes of `source` from `offset` to `target`, inside the kernel where it can.

    Args:
        source, target: file descriptors.
        progress: is told the bytes of each piece.
    """
    use_kernel = hasattr(os, "copy_file_range")
    while count:
        size = min(count, COPY_CHUNK)
        if use_kernel:
            try:
                done = os.copy_file_range(source, target, size, offset_src=offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                use_kernel = False  # other file systems: through memory, a piece at a time
                continue
        else:
            piece = os.pread(source, min(size, 2**20), offset)
            done = len(piece)
            while piece:
                piece = piece[os.write(target, piece) :]
        if done == 0:
            raise OSError(errno.EIO, "file became shorter while it was copied")
        offset, count = offset + done, count - done
        progress(done)


def copy_file(source: Path, target: Path, link: bool, progress: Callable[[int], None]):
    """Copies a file, as a hard link, by sharing blocks or byte by byte, whatever comes first and is allowed."""
    size = source.stat().st_size
    if link:
        os.link(source.resolve(), target)
        progress(size)
        return
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            progress(size)
        except OSError:
            copy_range(reader.fileno(), writer.fileno(), 0, size, progress)


@contextlib.contextmanager
def replaced_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name when the block ends, and disappears when it fails.

    An old folder of that name stays where it is until then.

    Raises:
        FileExistsError: `folder` is there, not empty, and `overwrite` was not asked for; or it holds the current or the
            home folder, which nobody means to lose.
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
        _sync(temporary)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path):
    """Gives the new folder its name; an old one of that name is under the temporary name afterwards, or gone."""
    occupied = folder.is_dir() and any(folder.iterdir())
    if not occupied:
        temporary.rename(folder)
    elif not _exchange(temporary, folder):
        old = temporary.with_suffix(".old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    _sync_directory(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, where the system can."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        return False


def _remove_leftovers(folder: Path):
    """Removes what a killed conversion to the same place has left, unless its process lives."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        owner = re.fullmatch(r"(\d+)-[0-9a-f]{8}\.partial", path.name.removeprefix(f".{folder.name}."))
        if owner and not Path(f"/proc/{owner[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path):
    for path in folder.iterdir():
        if path.is_dir():
            _sync(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
