"""Exit statuses, messages on stderr and checks that the sub-commands share."""

from importlib.util import find_spec
from pathlib import Path

import click

from .. import hub
from ..messages import say

USER_ERROR = 2
SOME_FAILED = 1
INTERRUPTED = 130
PIPE_CLOSED = 141  # the status of a program that SIGPIPE ends
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]  # weights that are not read


def wrote(paths, folder: str):
    """Prints which files were written to a folder."""
    say(f"wrote {', '.join(getattr(path, 'name', path) for path in paths)} to {folder}")


def require(*modules: str, extra: str):
    """Ends the command with the name of the extra to install if a module is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed: pip install 'attention-residuals[{extra}]'")


def local_folder(name: str) -> Path:
    """Returns the folder of a model: a local one, or where the files of a hub id were downloaded to."""
    return hub.local_folder(name, ignore_patterns=OTHER_FORMATS)
