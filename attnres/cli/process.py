"""Exit statuses, messages on stderr and checks that the sub-commands share."""

from importlib.util import find_spec
from pathlib import Path

import click

from ..messages import one_line, say

USER_ERROR = 2
SOME_FAILED = 1
INTERRUPTED = 130
PIPE_CLOSED = 141  # the status of a program that SIGPIPE ends
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]  # weights that are not read


def wrote(paths, folder: str):
    """Prints which files were written to a folder."""
    say(f"wrote {', '.join(getattr(path, 'name', path) for path in paths)} to {folder}")


def require(*modules: str, extra: str):
    """Checks that modules are installed.

    Raises:
        click.ClickException: a module is missing; the message names the extra that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed: pip install 'attention-residuals[{extra}]'")


def local_folder(name: str) -> str:
    """Returns the folder of a model: a path unchanged, or where the files of a hub id were downloaded to.

    Raises:
        click.ClickException: the hub id cannot be downloaded.
    """
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, ignore_patterns=OTHER_FORMATS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = one_line(error)
        raise click.ClickException(
            f"{name}: no such folder, and it cannot be downloaded from the Hub ({reason})"
        ) from None
