"""Helpers for what the commands print."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """An error message on one line of at most `limit` characters; the error's type if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def is_first() -> bool:
    """Returns whether this process is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str):
    """Prints a line to stderr, on rank 0 only."""
    if is_first():
        print(f"attnres: {line}", file=sys.stderr, flush=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars and warnings inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Hides what lm-eval logs and prints inside the block, its progress bars included."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
