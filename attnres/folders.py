"""Whether a folder of results can be made, asked before the work is done."""

import os
from pathlib import Path


def check_writable(folder: str | os.PathLike):
    """Refuses a folder that nothing could be written into.

    Raises:
        OSError: it is a file, or it or the folder that it would be made in cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise OSError(f"{folder}: cannot be written, because {nearest} is a file, not a folder; choose another place")
    if not os.access(nearest, os.W_OK):
        raise OSError(f"{folder}: cannot be written: no permission to write to {nearest}; choose another place")
