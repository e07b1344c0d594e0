"""Runs a function in several processes on this machine, each a rank of one gloo process group."""

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(function: Callable, ranks: int, *arguments, threads: int = 1) -> list:
    """Calls `function(*arguments)` in `ranks` new processes and returns the results in the order of the ranks.

    A rank that fails ends the others and raises its traceback here.
    """
    with tempfile.TemporaryDirectory(prefix="attnres-ranks-") as folder:
        job = (ranks, folder, threads, function, arguments)
        # One server imports what the ranks need, and they are its forks.
        torch.multiprocessing.start_processes(_run_rank, job, ranks, daemon=True, start_method="forkserver")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(ranks)]


def _run_rank(rank: int, ranks: int, folder: str, threads: int, function: Callable, arguments: tuple):
    torch.set_num_threads(threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))  # as torchrun does
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*arguments)))
    dist.barrier()  # a rank that ends closes connections that others may still read from
    dist.destroy_process_group()
