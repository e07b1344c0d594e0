"""Starts commands in several processes, each with a time limit, and none left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from processes import run_ranks
from transformers.utils import logging

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = HERE / "training_cases.py"
DDP = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def case(what: str, **options) -> dict:
    """A function of a module like tensor_ranks.py, and what it is called with."""
    return {"what": what, "options": options}


def in_ranks(ranks: int, module: str, cases: dict[str, dict], folder: Path | None = None) -> list[dict]:
    """What the cases return on each rank, by their names; each may have a folder of its own."""
    return run_ranks(run_cases, ranks, module, cases, folder)


def run_cases(module: str, cases: dict[str, dict], folder: Path | None) -> dict:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    functions, found = vars(import_module(module)), {}
    for number, (name, case) in enumerate(cases.items()):
        own = {} if folder is None else {"folder": folder / str(number)}
        found[name] = functions[case["what"]](**own, **case["options"])
        dist.barrier()
    return found


def start(*command, cwd: Path | None = None, **environment) -> subprocess.Popen:
    """A command of its own process group; its output is one pipe."""
    paths = [str(ROOT), str(ROOT / "tests"), str(HERE)]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """All output of a command, which is killed with its children when it takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return output


def launcher(*options) -> list[str]:
    """`accelerate launch` of two processes at a free port."""
    head = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*head, *map(str, options), "--num_processes", "2", "--main_process_port", "0"]


def run(*command, cwd: Path | None = None, **environment) -> str:
    """The output of a command that has to succeed."""
    process = start(*command, cwd=cwd, **environment)
    output = finish(process)
    assert process.returncode == 0, output[-6000:]
    return output


def outcomes_of(cases: dict[str, dict], out: Path, launch=(sys.executable,), cwd=None, **environment) -> list[dict]:
    """What each process noted of the cases, by their names."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    run(*launch, CASES, out / "cases.json", out, cwd=cwd, **environment)
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank-*.pt"))]


def train_options(material: Path, out: Path, per_device: int) -> list[str]:
    """Options of an `attnres train` of three steps."""
    options = [material / "model", "--data", material / "book.txt", "--out", out, "--use-cpu", "--sequence-length", 12]
    options += ["--per-device-train-batch-size", per_device, "--logging-steps", 1, "--max-steps", 3]
    return [*map(str, options), "--learning-rate", "1e-3", "--disable-tqdm", "true"]


def largest_error(found: dict, expected: dict) -> float:
    """The largest relative error of a tensor, by its norm; tensors that should be zero count absolutely."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - tensor).norm() / (tensor.norm() if tensor.norm() > 1e-12 else 1)).item()
        for name, tensor in expected.items()
    )
