"""One evaluation on several processes, started by `accelerate launch` or torchrun.

Rank 0 does all that a single process does, but distributes the model's batches over all ranks. The other ranks hold a
copy of the model each and answer their share. So prompts, batches and scores are those of one process, only rank 0
chooses the rows, reads data and writes, and an error on any rank fails the row on rank 0.
"""

import atexit
import os
import pickle
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as distributed

from ..messages import one_line

END = "end"
TIMEOUT = timedelta(weeks=52)  # a share can take hours; a lost process is noticed because its connections close
RESUME = "finished rows are kept; run the same command again to continue"


class ProcessLost(ConnectionError):
    """Another process has ended, so nothing more can be measured."""


class Team:
    """The processes of one evaluation, which exchange objects over gloo on every kind of device."""

    def __init__(self, device: str):
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=TIMEOUT)
        self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._ended = False
        if device != "cpu" and torch.accelerator.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.accelerator.set_device_index(local % torch.accelerator.device_count())
        atexit.register(self._leave_together)

    @contextmanager
    def leading(self) -> Iterator[Callable[[object], None]]:
        """Runs rank 0's block and yields a function that sends the outcome to the other ranks.

        An exception in the block is raised on the other ranks as well. SIGTERM is turned into a ProcessLost exception,
        so that the command ends with one line.
        """

        def stop(number, frame):
            raise ProcessLost(f"this process was told to end, as happens when another of {self.size} is lost; {RESUME}")

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield self._end
        except ProcessLost:
            raise
        except Exception as error:
            self._end(_portable(error))
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def follow(self, handlers: dict[str, Callable]):
        """Answers rank 0's calls until it ends; returns its outcome, or raises its exception."""
        while True:
            command, payload = self._scatter(None)
            if command == END:
                self._ended = True
                if isinstance(payload, Exception):
                    raise payload
                return payload
            reply = _attempt(handlers[command], payload)
            with self._connected():
                distributed.gather_object(reply, None, dst=0, group=self._group)

    def call(self, command: str, payloads: Sequence, handle: Callable) -> list:
        """Has every rank handle its payload, rank 0 by `handle`; returns the results in the order of the ranks.

        Raises:
            Exception: the exception of the first rank that failed, raised after all have answered.
            ProcessLost: another process has ended.
        """
        self._scatter([(command, payload) for payload in payloads])
        own = _attempt(handle, payloads[0])
        replies = [None] * self.size
        with self._connected():
            distributed.gather_object(None, replies, dst=0, group=self._group)
        replies[0] = own  # it may hold what cannot be pickled, such as a model
        for _, error, trace in replies:
            if error is not None:
                if error.__traceback__ is None:
                    error.__cause__ = RuntimeError(f"in another process:\n{trace}")
                raise error
        return [result for result, _, _ in replies]

    def _end(self, outcome):
        self._scatter([(END, outcome)] * self.size)
        self._ended = True

    def _scatter(self, messages: list | None) -> tuple:
        """Sends rank 0's messages, one to each rank; returns the message to this rank."""
        inbox = [None]
        with self._connected():
            distributed.scatter_object_list(inbox, messages, src=0, group=self._group)
        return inbox[0]

    def _leave_together(self):
        """Waits for all ranks at exit: a launcher kills the others, rank 0 included, as soon as one exits with 1."""
        if not self._ended:
            return
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(RuntimeError, ValueError):  # raised where another process has ended already
            distributed.barrier(group=self._group)

    @contextmanager
    def _connected(self):
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S*\] ", "", one_line(error, 10_000)).split(". ")[0][:160]
            raise ProcessLost(f"another of {self.size} processes is lost ({reason}); {RESUME}") from None


def join(device: str) -> Team | None:
    """Joins the processes that were started with this one; None for a single process."""
    return Team(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _attempt(handle: Callable, payload) -> tuple:
    """Returns (result, None, None), or (None, error, traceback): without a reply the other ranks would wait forever."""
    try:
        return handle(payload), None, None
    except ProcessLost:
        raise
    except Exception as error:
        return None, _portable(error), traceback.format_exc()


def _portable(error: Exception) -> Exception:
    """Returns the error, or a RuntimeError with the same message if it cannot be pickled."""
    with suppress(Exception):
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")
