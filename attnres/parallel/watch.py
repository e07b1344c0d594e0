"""Rank liveness: a lost rank must end the job with its name, never leave the others waiting.

Every rank increments a heartbeat in the job's key-value store from a thread of its own. A rank whose connection breaks
looks up which rank has failed or fallen silent, and names it. A rank that would wait forever, because another was
stopped or its machine vanished without closing a connection, is ended by its thread.
"""

import atexit
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

BEAT_SECONDS = 1.0
LOST_SECONDS = 25.0  # of silence; longer than any operation that holds Python's lock
ASK_SECONDS = 4 * BEAT_SECONDS  # for which a rank with a broken connection listens who is silent
GRACE_SECONDS = 3.0  # for a rank's own error to be said before its thread ends it
LOST_EXIT_STATUS = 75  # of a rank that ended because another was lost

_BROKEN = re.compile(r"\bgloo\b|\bnccl|connection (closed|reset|refused)|broken pipe|by peer", re.IGNORECASE)


class PipelineError(RuntimeError):
    """A rank of the pipeline is lost or has failed; one line that names it."""


class Watch:
    """One per process group that is the default one; see `current`."""

    def __init__(self, store: dist.Store):
        self.store = store
        self._beats = dist.PrefixStore("attnres/watch", store)
        self.rank = dist.get_rank()
        self._beats.set(f"process/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        self._beats.add(f"beat/{self.rank}", 1)  # now: whose first beat never came would be taken for one not started
        self._guarded: tuple[int, ...] = ()
        self._guards = 0  # so far: tells one from the next
        self._reported = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attnres-watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self):
        """Says that this rank has ended as it should."""
        if not self._stop.is_set():
            self._stop.set()
            with contextlib.suppress(Exception):  # the store may be gone already
                self._beats.set(f"state/{self.rank}", "has ended")
            self._thread.join(timeout=2 * BEAT_SECONDS)

    @contextlib.contextmanager
    def guard(self, ranks: Collection[int], what: str) -> Iterator[None]:
        """While this rank works with others: whatever goes wrong on any of them becomes one `PipelineError`."""
        if self._reported:  # and caught: this rank goes on
            self._beats.delete_key(f"state/{self.rank}")
            self._reported = False
        with self._lock:
            self._guarded = tuple(sorted(rank for rank in ranks if rank != self.rank))
            self._guards += 1
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            raise PipelineError(self.explain(error, ranks, what)) from error
        finally:
            with self._lock:
                self._guarded = ()

    def explain(self, error: Exception, ranks: Collection[int], what: str) -> str:
        """One line: which of the ranks has failed or is lost, and tells the others of it if it is this one."""
        message = _innermost(error)
        if not _BROKEN.search(message):
            self._report(f"failed: {message}")
            return f"rank {self.rank} failed in {what}: {message}"
        try:
            found = self._who(sorted(rank for rank in ranks if rank != self.rank))
        except Exception:
            return f"rank {self.rank}, in {what}: the process that holds the job's store (launcher or rank 0) is gone"
        if found:
            self._report(f"stopped: {found}")  # who hears of it from this rank only says the same
            return f"rank {self.rank}, in {what}: {found}"
        return f"rank {self.rank}, in {what}: lost its connection ({message})"

    def _report(self, state: str):
        with contextlib.suppress(Exception):  # the store may be gone too
            self._beats.set(f"state/{self.rank}", state)
            self._reported = True

    def _who(self, ranks: list[int]) -> str:
        """Which rank has failed, ended or fallen silent, after listening for a while."""
        before = {rank: self._beat(rank) for rank in ranks}
        ends = time.monotonic() + ASK_SECONDS
        while time.monotonic() < ends:
            for rank in ranks:
                state = self._state(rank)
                if state is not None:
                    return _said(rank, state)
            gone = [rank for rank in ranks if self._is_gone(rank)]
            if gone:
                return _lost(gone)
            time.sleep(BEAT_SECONDS / 20)
        silent = [rank for rank in ranks if before[rank] is not None and self._beat(rank) == before[rank]]
        return _lost(silent) if silent else ""

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank on this machine has ended without a word: known at once, before anybody ends this one too."""
        host, _, process = (self._get(f"process/{rank}") or "").partition(" ")
        return host == socket.gethostname() and _has_ended(int(process))

    def _beat(self, rank: int) -> str | None:
        """`None` for a rank that has not started to watch yet: it may load data for as long as it likes."""
        return self._get(f"beat/{rank}")

    def _state(self, rank: int) -> str | None:
        return self._get(f"state/{rank}")

    def _get(self, key: str) -> str | None:
        return self._beats.get(key).decode() if self._beats.check([key]) else None

    def _run(self):
        heard: dict[int, tuple[str, float]] = {}  # rank: its beat, and when that was new
        while not self._stop.wait(BEAT_SECONDS):
            with self._lock:
                guarded, number = self._guarded, self._guards
            try:
                self._beats.add(f"beat/{self.rank}", 1)
                problem = self._problem(guarded, heard)
            except Exception:
                if self._stop.is_set() or not guarded:
                    return  # others have ended, this rank is about to
                problem = "the process that holds the job's store (launcher or rank 0) is gone"
            if not guarded:
                heard.clear()
            elif problem and not self._stop.wait(GRACE_SECONDS + ASK_SECONDS):
                with self._lock:
                    waiting = self._guarded and self._guards == number
                if waiting:
                    print(f"attnres: rank {self.rank}: {problem}; ending this process", file=sys.stderr, flush=True)
                    os._exit(LOST_EXIT_STATUS)

    def _problem(self, guarded: tuple[int, ...], heard: dict[int, tuple[str, float]]) -> str | None:
        now = time.monotonic()
        for rank in guarded:
            state = self._state(rank)
            if state is not None:
                return _said(rank, state)
            beat = self._beat(rank)
            if beat is not None and heard.get(rank, ("", now))[0] != beat:
                heard[rank] = (beat, now)
        silent = [rank for rank in guarded if rank in heard and now - heard[rank][1] > LOST_SECONDS]
        return _lost(silent) if silent else None


_watch: Watch | None = None


def current() -> Watch:
    """The watch of the default process group."""
    global _watch
    store = _get_default_store()
    if _watch is None or _watch.store is not store:
        if _watch is not None:
            _watch.stop()
        _watch = Watch(store)
    return _watch


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat").read_text()
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or no such files on this system
        return False
    return status.rpartition(")")[2].split()[0] in "ZX"  # its parent has not asked for its exit status yet


def _said(rank: int, state: str) -> str:
    return state.removeprefix("stopped: ") if state.startswith("stopped: ") else f"rank {rank} {state}"


def _lost(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} is lost" if len(ranks) == 1 else f"ranks {names} are lost"


def _innermost(error: BaseException) -> str:
    """The cause that torch's schedules wrap, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines[0].split())}"
