"""Hides what lm-eval shows, which is a progress bar per task and step."""

import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO


@contextmanager
def quiet_lm_eval():
    """Hides what lm-eval logs and prints inside the block, its progress bars included."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)
