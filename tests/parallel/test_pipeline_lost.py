"""A lost rank ends the job within a minute with an error that names it, and no process stays."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pipeline_lost
import pytest

from attnres.parallel.launch import run_ranks
from attnres.parallel.watch import PipelineError

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}
MINUTE = 60


def processes_with(marker: str) -> list[int]:
    """Processes that have a mark in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            command = (environment.parent / "cmdline").read_bytes()  # multiprocessing's tracker belongs to this process
            if marker.encode() in environment.read_bytes() and b"resource_tracker" not in command:
                found.append(int(environment.parent.name))
        except OSError:  # not ours, or gone
            continue
    return found


def start(arguments: list[str], marker: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**environment, "ATTNRES_TEST": marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=2 * MINUTE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, errors


def without_processes(marker: str) -> bool:
    ends = time.monotonic() + 5
    while processes_with(marker) and time.monotonic() < ends:
        time.sleep(0.1)
    return not processes_with(marker)


@pytest.fixture
def lost_at(tmp_path, monkeypatch):
    """Where the rank notes when it was lost: starting processes is no part of the minute."""
    path = tmp_path / "lost-at"
    monkeypatch.setenv("ATTNRES_LOST_AT", str(path))
    return path


@pytest.mark.parametrize(
    ("launcher", "way", "said"),
    [
        # The launcher ends the other ranks at once, most often before they have said anything.
        ("torchrun", "killed", r"Signal 9 \(SIGKILL\) received by PID"),
        pytest.param("torchrun", "raised", r"rank 1 failed in a training step: MemoryError", marks=pytest.mark.slow),
        pytest.param("accelerate", "killed", r"Signal 9 \(SIGKILL\) received by PID", marks=pytest.mark.slow),
    ],
)
def test_launchers_end_the_job_and_name_the_rank(launcher, way, said, lost_at):
    marker = f"lost-{launcher}-{way}-{os.getpid()}"
    status, errors = finish(start([*LAUNCHERS[launcher], str(pipeline_lost.__file__), way], marker))
    assert status != 0 and time.monotonic() - float(lost_at.read_text()) < MINUTE
    assert re.search(said, errors)
    assert "rank      : 1 " in errors.partition("Root Cause (first observed failure)")[2]
    assert without_processes(marker)


WAITED = "^rank [02] stopped waiting for a lost rank, which it names on stderr$"


@pytest.mark.parametrize(
    ("way", "ranks", "said", "on_stderr"),
    [
        pytest.param("killed", 2, "^rank 1 is lost: its process was ended by SIGKILL$", "", marks=pytest.mark.slow),
        ("stopped", 3, WAITED, "rank [02]: rank 1 is lost; ending this process"),
        ("raised", 2, "rank 1 failed.*: MemoryError: no memory for the second micro-batch$", ""),
        pytest.param("caught", 2, WAITED, "rank [02]: rank 1 failed: MemoryError", marks=pytest.mark.slow),
    ],
)
def test_own_processes_end_with_one_line_that_names_the_rank(way, ranks, said, on_stderr, lost_at, monkeypatch, capfd):
    marker = f"lost-own-{way}-{os.getpid()}"
    monkeypatch.setenv("ATTNRES_TEST", marker)
    with pytest.raises(PipelineError, match=said):
        run_ranks(pipeline_lost.train, ranks, way, 3.0 if way == "stopped" else None)
    assert time.monotonic() - float(lost_at.read_text()) < MINUTE
    assert without_processes(marker)
    assert re.search(on_stderr, capfd.readouterr().err)
