"""One bar per row, where lm-eval shows one per task and step."""

import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TextIO

from tqdm import tqdm


class _CountAnswers:
    """lm-eval calls its cache's hook once for every answer."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def add_partial(self, *_):
        self.bar.update()


@contextmanager
def request_bar(lm, description: str, stream: TextIO):
    """Shows how many of a row's requests the model has answered."""
    hook = lm.cache_hook
    with tqdm(desc=description, unit="request", file=stream, leave=False) as bar:

        def expect(requests: int):
            bar.total = (bar.total or 0) + requests
            bar.refresh()

        lm.cache_hook, lm.expect = _CountAnswers(bar), expect
        try:
            yield
        finally:
            lm.cache_hook, lm.expect = hook, None


@contextmanager
def quiet_lm_eval():
    """lm-eval warns of options that are set on purpose, logs every task, prints, and shows fleeting bars."""
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
