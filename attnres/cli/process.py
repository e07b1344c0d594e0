"""What the sub-commands share with the process: exit statuses, what is said on stderr, what must be installed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

USER_ERROR = 2
SOME_FAILED = 1
INTERRUPTED = 130
PIPE_CLOSED = 141  # as of a program that SIGPIPE ends
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]  # of weights, which are not read


class CommandError(Exception):
    """A mistake of the user, or something missing on the machine: shown as one line."""


def say(line: str):
    """What ends a command, said by the first of several processes: all of them meet it."""
    if is_first():
        print(f"attnres: {line}", file=sys.stderr)


def is_first() -> bool:
    """Of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def wrote(paths, folder: str):
    print(f"attnres: wrote {', '.join(getattr(path, 'name', path) for path in paths)} to {folder}", file=sys.stderr)


def require(*modules: str, extra: str):
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'attention-residuals[{extra}]'")


def local_folder(name: str) -> str:
    """A local folder as it is; a hub id is downloaded, without the formats that are not read."""
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, ignore_patterns=OTHER_FORMATS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CommandError(f"{name}: no such folder, and it cannot be downloaded from the hub ({reason})") from None
