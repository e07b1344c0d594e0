"""A lost rank ends the others with torch's own errors, as docs/pipeline.md says."""

import os
import re
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import random_attnres, random_tokens
from torch.multiprocessing import start_processes

from attnres.parallel import Pipeline


def train(rank: int, folder: str, way: signal.Signals, seconds: int):
    """Steps until rank 1 is gone, in the middle of one; rank 0 notes its error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    pipeline = Pipeline(random_attnres("llama", layers=2), group, micro_batches=2)
    batch = random_tokens(2, 9)
    calls = iter(range(100))

    def lose(*_):
        if next(calls) == 5:
            os.kill(os.getpid(), way)

    if rank == 1:
        pipeline.stages[0].register_forward_pre_hook(lose)
    try:
        while True:
            pipeline.step(batch, batch)
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        Path(folder, "error").write_text(f"{type(causes[-1]).__name__}: {causes[-1]}")
        os._exit(3)


@pytest.mark.parametrize(
    ("way", "seconds", "said"),
    [(signal.SIGKILL, 200, "Connection (closed|reset) by peer"), (signal.SIGSTOP, 8, "Timed out waiting 8000ms")],
)
def test_the_other_rank_ends_with_an_error(way, seconds, said, tmp_path):
    arguments = (str(tmp_path), way, seconds)
    processes = start_processes(train, arguments, 2, join=False, daemon=True, start_method="forkserver")
    first, second = processes.processes
    try:
        first.join(300)
        assert first.exitcode == 3
        assert re.search(said, (tmp_path / "error").read_text())
    finally:
        for process in (first, second):
            process.kill()
            process.join()
