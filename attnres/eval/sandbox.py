"""Runs programs that a model wrote, on the same kernel, and reports whether their tests pass.

On any Linux:

- "passed" means that every test ran to its end in an interpreter in which the program never ran, on plain values that
  the program sent. The program holds neither the expected values nor the pipe of the verdict, so `sys.exit`, patched
  builtins, a result that equals everything or text on stdout fake nothing (see `sandbox_protocol`).
- The program gets no environment variables, no descriptor except the socket for calls, a wall-clock limit, and limits
  on CPU time, address space, file size, open files and processes. What it prints is discarded.

Where the kernel grants namespaces (to root, or to users); `Outcome.missing` names those that it does not grant:

- There is no network. The program sees no process except its own, and all of them end with it. It sees the Python
  installation, read-only, and an empty folder of 64 MiB, and no other file.

If the evaluation runs as root, the program runs under a user id of its own, with or without namespaces.

Not guaranteed: a program may break the kernel. Without namespaces and root, it can kill the user's processes and read
or delete the user's files. Memory is limited per process (1 GiB, at most 8 processes), not in total. A test that takes
names other than builtins from the program, such as a helper function of a HumanEval prompt, trusts the program with
them, as the original harness does. Results of the program's own classes equal no plain value. Use a virtual machine for
the programs of a model that you do not trust.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from math import comb
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

TIMEOUT = 3.0  # seconds, as in the original harness
STARTUP = 60.0  # seconds for the processes to start on a busy machine, which are not part of the program's time
LAUNCHER = Path(__file__).with_name("sandbox_process.py")
FENCES = {
    "network": "no network",
    "processes": "processes of its own",
    "files": "files of its own",
    "ipc": "shared memory of its own",
}


class Outcome(NamedTuple):
    """The outcome of one program; `missing` names the entries of FENCES that the kernel did not grant."""

    passed: bool
    reason: str
    seconds: float
    missing: tuple[str, ...]


def run_program(program: str, tests: str, *, timeout: float = TIMEOUT) -> Outcome:
    """Defines `program` in a sandboxed process and runs `tests` against it from another one.

    Args:
        program: text of a module; code under `if __name__ == "__main__"` does not run.
        tests: text that raises an exception unless the program is right; it may call what the program defines.
        timeout: wall-clock seconds for program and tests together, from the start of the program.

    Raises:
        OSError: the sandbox did not start, which says nothing about the program.
    """
    start = time.monotonic()
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="attnres-", ignore_cleanup_errors=True) as directory:
        processes = []
        try:
            for role, end, text in (("serve", ours, program), ("check", theirs, tests)):
                place = Path(directory, role)
                place.mkdir()
                processes.append(_launch(role, end, place, timeout, text))
                end.close()
            fences, _ = [_read_line(process.stdout.fileno(), start + STARTUP) for process in processes]
            verdict, reason = _read_line(processes[1].stdout.fileno(), start + STARTUP + timeout)
        except (TypeError, ValueError):
            verdict, reason, fences = "not started", "the sandbox reported nothing", None
        finally:
            ours.close()
            theirs.close()
            for process in processes:
                _end(process)
    if verdict == "not started" or fences is None:
        raise OSError(f"a program could not be run: {reason}")
    missing = tuple(name for name in FENCES if not fences[name])
    return Outcome(verdict == "passed", reason, time.monotonic() - start, missing)


def _launch(role: str, end: socket.socket, place: Path, timeout: float, text: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-I", str(LAUNCHER), role, str(end.fileno()), str(place), str(timeout)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[end.fileno()],
        start_new_session=True,
        bufsize=0,  # nothing may be left to flush when the process has ended
        # By default, numerical libraries start one thread per core, which the process limit forbids.
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": "/sandbox", "HOME": "/sandbox"},
    )
    data = text.encode(errors="surrogatepass")
    with suppress(BrokenPipeError):  # the process then reports nothing either, which is noticed
        process.stdin.write(b"%d\n" % len(data) + data)
    return process


def _read_line(descriptor: int, deadline: float):
    """Reads one line of JSON from a pipe; None if the pipe ends or the time is up."""
    line = b""
    while not line.endswith(b"\n"):
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        byte = poll.poll(max(0, deadline - time.monotonic()) * 1000) and os.read(descriptor, 1)
        if not byte:
            return None
        line += byte
    return json.loads(line)


def _end(process: subprocess.Popen):
    with suppress(BrokenPipeError):
        process.stdin.close()  # the signal to end for the processes inside
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


class SandboxedCodeEval:
    """Replaces `evaluate.load("code_eval")`, which runs programs with the rights of the user."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """Returns pass@k, the unbiased estimate over all problems, and the outcome of each program per problem.

        Args:
            references: text of the tests of each problem.
            predictions: candidate programs of each problem.
            k: values of k; those with fewer candidates than k are left out.
        """
        outcomes = {
            problem: [run_program(program, tests) for program in programs]
            for problem, (tests, programs) in enumerate(zip(references, predictions, strict=True))
        }
        counts = [(len(found), sum(outcome.passed for outcome in found)) for found in outcomes.values()]
        scores = {
            f"pass@{size}": fmean(1 - comb(total - right, size) / comb(total, size) for total, right in counts)
            for size in k
            if all(total >= size for total, _ in counts)
        }
        return scores, outcomes
