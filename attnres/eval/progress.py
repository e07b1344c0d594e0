"""Shows one progress bar per row, where lm-eval shows one per task and step."""

import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import TextIO

from tqdm import tqdm


@contextmanager
def request_bar(lm, description: str, stream: TextIO):
    """Shows inside the block how many of a row's requests the model has answered."""
    hook = lm.cache_hook
    with tqdm(desc=description, unit="request", file=stream, leave=False) as bar:

        def expect(requests: int):
            bar.total = (bar.total or 0) + requests
            bar.refresh()

        # lm-eval calls the hook of its cache once for every answer.
        lm.cache_hook, lm.expect = SimpleNamespace(add_partial=lambda *_: bar.update()), expect
        try:
            yield
        finally:
            lm.cache_hook, lm.expect = hook, None


@contextmanager
def quiet_lm_eval():
    """Hides what lm-eval logs and prints inside the block, its progress bars included."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
