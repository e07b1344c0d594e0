"""Finds the folder of a checkpoint: a local one, or the download of a hub id."""

import os
from pathlib import Path

from .messages import one_line


def local_folder(name: str, revision: str | None = None, **patterns: list[str]) -> Path:
    """Returns a local folder, or where the files of a hub id were downloaded to.

    Args:
        name, revision: folder, in which ~ is expanded, or hub id and its revision.
        patterns: `allow_patterns` and `ignore_patterns` of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: there is no such folder, the hub id cannot be downloaded, or a folder is given with a revision.
    """
    folder = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves an unknown user as it is
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{name}: a folder has no revisions, got --revision {revision}; leave it out.")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such folder.")
    return download(name, revision, **patterns)


def download(name: str, revision: str | None = None, **patterns: list[str]) -> Path:
    """Returns where the files of a hub id were downloaded to; raises ValueError if that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        reason = one_line(error)
        raise ValueError(f"{name}: no such folder, and it cannot be downloaded from the hub ({reason}).") from None
