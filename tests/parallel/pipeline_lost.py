"""A pipelined training whose second rank is lost in the middle of a step, in one of several ways."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import random_attnres, random_tokens

from attnres.parallel import Pipeline, watch

LOST = 1


def train(way: str, silence: float | None = None):
    """Steps until the rank is lost; in the third, in its second forward pass."""
    if silence is not None:
        watch.LOST_SECONDS = silence
    model = random_attnres("llama", layers=6)
    pipeline = Pipeline(model, schedule="interleaved-1f1b", virtual_stages=2, micro_batches=4)
    calls = 0

    def lose(*_):
        nonlocal calls
        calls += 1
        if calls < 10:
            return
        Path(os.environ["ATTNRES_LOST_AT"]).write_text(str(time.monotonic()))  # the clock of the machine
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif way == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        raise MemoryError("no memory for the second micro-batch\nand more lines")

    if dist.get_rank() == LOST:
        pipeline.stages[0].register_forward_pre_hook(lose)
    batch = random_tokens(4, 9)
    try:
        for _ in range(100):
            pipeline.step(batch, batch)
    except watch.PipelineError:
        if way == "caught" and dist.get_rank() == LOST:
            time.sleep(300)  # somebody's script that goes on after an error
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(sys.argv[1])
