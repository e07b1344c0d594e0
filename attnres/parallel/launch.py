"""Starts the processes of a small job on this machine, with torch.multiprocessing."""

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from .watch import LOST_EXIT_STATUS, PipelineError, current

HOST = "127.0.0.1"
GRACE_SECONDS = 3.0  # for the other ranks to end after a failure, before they are killed


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
    with tempfile.TemporaryDirectory(prefix="attnres-ranks-") as folder:
        job = (ranks, store.port, folder, threads, function, arguments)
        processes = start_processes(_run_rank, job, ranks, join=False, daemon=True, start_method="spawn")
        try:
            while not processes.join(grace_period=GRACE_SECONDS):
                pass
        except ProcessRaisedException as error:
            raise PipelineError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
        except ProcessExitedException as error:
            if error.exit_code == LOST_EXIT_STATUS:
                reason = "stopped waiting for a lost rank, which it names on stderr"
            else:
                name = error.signal_name
                end = f"was ended by {name}" if name else f"ended with status {error.exit_code}"
                reason = f"is lost: its process {end}"
            raise PipelineError(f"rank {error.error_index} {reason}") from None
        finally:
            for process in processes.processes:  # after Ctrl-C, too
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _run_rank(rank: int, ranks: int, port: int, folder: str, threads: int, function: Callable, arguments: tuple):
    torch.set_num_threads(threads)
    store = dist.TCPStore(HOST, port, world_size=ranks, is_master=False, timeout=timedelta(minutes=5))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        result = function(*arguments)
    except PipelineError:
        raise
    except Exception as error:
        raise PipelineError(current().explain(error, range(ranks), "its work")) from error
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))  # tensors by value: this process ends
    dist.barrier()  # nobody closes connections that another still reads from
    dist.destroy_process_group()
