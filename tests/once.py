"""Results that are costly to make, made once for all processes that pytest runs tests in."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def once(tmp_path_factory, name: str, make: Callable[[Path], object]):
    """What `make(folder)` returns: called by the first process that asks for the name, and handed to the others.

    A fixture of a module is made anew in every process that gets one of the module's tests; one that starts processes
    of its own would take a minute each time.
    """
    top = tmp_path_factory.getbasetemp()
    top = top.parent if "PYTEST_XDIST_WORKER" in os.environ else top
    stored, unfinished = top / f"{name}.pickle", top / f"{name}.unfinished"
    with FileLock(top / f"{name}.lock"):
        if not stored.exists():
            made = make(tmp_path_factory.mktemp(name))
            unfinished.write_bytes(pickle.dumps(made))
            unfinished.rename(stored)
    return pickle.loads(stored.read_bytes())
