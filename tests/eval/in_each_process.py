"""What test_parallel.py has `accelerate launch` start in each process; notes what each returned."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from attnres.eval import evaluate
from attnres.eval.lm import CausalLM, _without_nan

mode, checkpoint, mirror, out = sys.argv[1:]

if os.environ["RANK"] == "1":
    if mode == "nan":
        CausalLM._score = lambda *_: _without_nan(torch.tensor(torch.nan))
    elif mode == "lost":
        HFLM.generate_until = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

outcome = evaluate(
    checkpoint, "gsm8k,arc_challenge", out=out, data_dir=mirror, max_length=900, batch_size=2, progress=False
)
outcome["rows"] = {name: result["score"]["value"] for name, result in outcome["rows"].items()}
Path(out, f"outcome-{os.environ['RANK']}.json").write_text(json.dumps(outcome))
