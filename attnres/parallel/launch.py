"""Starts the processes of a small job on this machine, and ends all of them when one is lost."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from .watch import LOST_EXIT_STATUS, LOST_SECONDS, PipelineError, current

SETTLE_SECONDS = 3.0  # after a failure: time for the other ranks to fail too, so that the first cause is known
SETTLE_WAITING_SECONDS = 10.0  # where ranks end that have waited in vain: each finds out by itself
PR_SET_PDEATHSIG = 1
HOST = "127.0.0.1"


def run_ranks(function: Callable, ranks: int, *arguments, threads: int = 1) -> list:
    """Calls `function(*arguments)` in `ranks` new processes, each in a gloo process group with the others.

    Args:
        function: importable by its name.
        ranks: number of processes.
        arguments: of the function; pickled.
        threads: of torch in each process.

    Returns:
        What each rank's call returned, in their order.

    Raises:
        PipelineError: a rank failed or was lost; names it. No process is left.
    """
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # here it outlives every rank
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for rank in range(ranks):
            mine, theirs = context.Pipe(duplex=False)
            job = (theirs, store.port, rank, ranks, os.getpid(), threads, function, arguments)
            process = context.Process(target=_rank_main, args=job, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(mine)
        results = _collect(processes, connections)
        for process in processes:
            process.join(timeout=SETTLE_SECONDS)
        return results
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(processes: list, connections: list[Connection]) -> list:
    results: dict[int, object] = {}
    problems: dict[int, str] = {}
    open_ranks = dict(enumerate(connections))
    settled = None
    while open_ranks and (settled is None or time.monotonic() < settled):
        timeout = None if settled is None else max(0.0, settled - time.monotonic())
        for connection in wait(list(open_ranks.values()), timeout):
            rank = connections.index(connection)
            try:
                succeeded, outcome = pickle.loads(connection.recv_bytes())
            except EOFError:  # it ended without a word
                processes[rank].join(timeout=SETTLE_SECONDS)
                problems[rank] = _death(processes[rank].exitcode)
            else:
                (results if succeeded else problems)[rank] = outcome
            del open_ranks[rank]
        if problems and settled is None:
            waited = any(processes[rank].exitcode == LOST_EXIT_STATUS for rank in problems)
            settled = time.monotonic() + (SETTLE_WAITING_SECONDS if waited else SETTLE_SECONDS)
    if not problems:
        return [results[rank] for rank in range(len(processes))]
    statuses = {rank: processes[rank].exitcode for rank in problems}
    own = {rank: text for rank, text in problems.items() if text.startswith(f"rank {rank} failed")}
    lost = {rank for rank, status in statuses.items() if status not in (None, 0, LOST_EXIT_STATUS)}
    if not own and not lost and LOST_EXIT_STATUS in statuses.values():
        lost = set(open_ranks)  # stopped or stuck: what they are waiting for is said by the others, on stderr
        problems.update(dict.fromkeys(lost, f"nobody has heard of it for {LOST_SECONDS:.0f} s, or it does not go on"))
    if lost:
        rank = min(lost)
        raise PipelineError(f"rank {rank} is lost: {problems[rank]}")
    raise PipelineError(min((own or problems).items())[1])


def _death(exit_status: int | None) -> str:
    if exit_status is not None and exit_status < 0:
        return f"its process was ended by {signal.Signals(-exit_status).name}"
    return f"its process ended with status {exit_status}"


def _rank_main(connection, port: int, rank: int, ranks: int, parent: int, threads: int, function, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers Ctrl-C for all
    _end_with(parent)
    torch.set_num_threads(threads)
    store = dist.TCPStore(HOST, port, world_size=ranks, is_master=False, timeout=timedelta(minutes=5))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        outcome = (True, function(*arguments))
    except PipelineError as error:
        outcome = (False, str(error))
    except Exception as error:
        outcome = (False, current().explain(error, range(ranks), "its work"))
    connection.send_bytes(pickle.dumps(outcome))  # tensors by value: this process ends
    connection.close()
    if outcome[0]:
        dist.barrier()  # nobody closes connections that another still reads from
        dist.destroy_process_group()


def _end_with(parent: int):
    """Asks the kernel to end this process when its parent is gone, however that ended."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
