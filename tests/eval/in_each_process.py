"""What test_parallel.py starts in two processes: a run with NaN on rank 1, and a run in which rank 1 is killed."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from attnres.eval import evaluate
from attnres.eval.lm import CausalLM, _without_nan

checkpoint, mirror, out = sys.argv[1:]
rank = os.environ["RANK"]


def run(name):
    return evaluate(
        checkpoint, "gsm8k,arc_challenge", out=Path(out, name), data_dir=mirror, max_length=900, batch_size=2,
        progress=False,
    )  # fmt: skip


score = CausalLM._score
if rank == "1":
    CausalLM._score = lambda *_: _without_nan(torch.tensor(torch.nan))
outcome = run("nan")
outcome["rows"] = {name: result["score"]["value"] for name, result in outcome["rows"].items()}
Path(out, f"outcome-{rank}.json").write_text(json.dumps(outcome))
CausalLM._score = score
if rank == "1":
    HFLM.generate_until = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
run("lost")
