"""Copies and links large files."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

COPY_CHUNK = 64 * 2**20  # bytes between two reports of progress


def copy_range(source: int, target: int, offset: int, count: int, progress: Callable[[int], None]):
    """Appends a range of one file descriptor to another, inside the kernel, where the file system may share blocks."""
    while count:
        try:
            done = os.copy_file_range(source, target, min(count, COPY_CHUNK), offset_src=offset)
        except (AttributeError, OSError):  # not on this system or between these file systems: copied through memory
            done = os.write(target, os.pread(source, min(count, 2**20), offset))
        if done == 0:
            raise OSError(errno.EIO, "file became shorter while it was copied")
        offset, count = offset + done, count - done
        progress(done)


def copy_file(source: Path, target: Path, link: bool, progress: Callable[[int], None]):
    """Copies a file, or makes a hard link to it; `progress` is called with the number of bytes of each piece."""
    size = source.stat().st_size
    if link:
        os.link(source.resolve(), target)
        progress(size)
        return
    with source.open("rb") as reader, target.open("xb") as writer:
        copy_range(reader.fileno(), writer.fileno(), 0, size, progress)
