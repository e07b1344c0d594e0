"""Copies and links large files, inside the kernel where it can."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

FICLONE = 0x40049409  # ioctl of Linux: share the blocks of another file, copy on write
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
