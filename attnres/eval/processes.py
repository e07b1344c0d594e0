"""One evaluation on several processes, as `accelerate launch` or torchrun starts them.

Rank 0 leads: it does all that a single process does, but deals the model's batches out to all. The others
hold a copy of the model each and answer. So prompts, batches and scores are those of one process, only one decides what
is measured, reads data and writes, and an error in any share reaches the one place where rows fail.
"""

import atexit
import os
import pickle
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

END = "end"
PATIENCE = timedelta(weeks=52)  # shares take hours; a process that is lost closes its connections, which is noticed


class ProcessLost(ConnectionError):
    """Another process is gone: nothing more can be measured."""


class Team:
    """The processes of one evaluation. Objects travel over gloo, whatever the devices."""

    def __init__(self, device: str):
        import torch
        import torch.distributed as distributed

        self._distributed = distributed
        self._owned = not distributed.is_initialized()
        if not self._owned:
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        else:
            distributed.init_process_group("gloo", timeout=PATIENCE)
            self._group = distributed.group.WORLD
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._ended = False
        if device != "cpu" and torch.accelerator.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.accelerator.set_device_index(local % torch.accelerator.device_count())
        atexit.register(self._leave_together)

    @contextmanager
    def leading(self) -> Iterator[Callable[[object], None]]:
        """What rank 0 does; gives the function that tells the others the outcome.

        An error that rank 0 raises in here is raised by the others too.
        """
        with _termination_raises(f"this process was told to end, as launchers do when another of {self.size} is lost"):
            try:
                yield lambda outcome: self._end(outcome)
            except ProcessLost:
                raise
            except Exception as error:
                self._end(_portable(error))
                raise

    def follow(self, handlers: dict[str, Callable]):
        """What all others do: answer until the first ends; its outcome, or its error raised."""
        while True:
            inbox = [None]
            with self._connected():
                self._distributed.scatter_object_list(inbox, None, src=0, group=self._group)
            command, payload = inbox[0]
            if command == END:
                self._ended = True
                if isinstance(payload, Exception):
                    raise payload
                return payload
            reply = _attempt(handlers[command], payload)
            with self._connected():
                self._distributed.gather_object(reply, None, dst=0, group=self._group)

    def call(self, command: str, payloads: Sequence, handle: Callable) -> list:
        """Has every process handle its payload, this one by `handle`; the results in order of the processes.

        Raises:
            Exception: what the first process that failed raised, after all have answered.
            ProcessLost: there is no answer to wait for.
        """
        with self._connected():
            messages = [(command, payload) for payload in payloads]
            self._distributed.scatter_object_list([None], messages, src=0, group=self._group)
        own = _attempt(handle, payloads[0])
        replies = [None] * self.size
        with self._connected():
            self._distributed.gather_object(None, replies, dst=0, group=self._group)
        replies[0] = own  # which may be what cannot be sent, such as a model
        for _, error, trace in replies:
            if error is not None:
                if error.__traceback__ is None:
                    error.__cause__ = RuntimeError(f"in another process:\n{trace}")
                raise error
        return [result for result, _, _ in replies]

    def _end(self, outcome):
        with self._connected():
            self._distributed.scatter_object_list([None], [(END, outcome)] * self.size, src=0, group=self._group)
        self._ended = True

    def _leave_together(self):
        """A launcher stops all processes when one ends with an error: the first must have said everything by then."""
        if not self._ended:
            return
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(RuntimeError, ValueError):  # one of them is gone already
            self._distributed.barrier(group=self._group)
            if self._owned:
                self._distributed.destroy_process_group()

    @contextmanager
    def _connected(self):
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).split(". ")[0][:160]
            raise ProcessLost(
                f"another of {self.size} processes is lost ({reason}). Finished rows are kept; the same command goes "
                "on from there."
            ) from None


def join(device: str) -> Team | None:
    """The processes that were started with this one; None if there are no others."""
    return Team(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _attempt(handle: Callable, payload) -> tuple:
    """The result, or the error with its trace: whoever fails must still answer, or the others wait forever."""
    try:
        return handle(payload), None, None
    except ProcessLost:
        raise
    except Exception as error:
        return None, _portable(error), traceback.format_exc()


def _portable(error: Exception) -> Exception:
    """The error, or one of the same words where it does not survive being sent."""
    with suppress(Exception):
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _termination_raises(reason: str):
    """SIGTERM as an error, so that one line says what happened."""

    def stop(number, frame):
        raise ProcessLost(f"{reason}. Finished rows are kept; the same command goes on from there.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
