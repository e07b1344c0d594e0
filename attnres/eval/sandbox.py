"""Runs programs that a model wrote and reports whether their tests pass. Not a security sandbox: it shares the kernel.

What is guaranteed on any Linux:

- "passed" means that every test was carried out, in an interpreter in which the program never ran, on plain values
  that the program sent. `sys.exit`, `os._exit`, patched builtins, a result that equals everything, or text on stdout
  fake nothing: the program holds neither the expected values nor the pipe of the verdict. See `sandbox_protocol`.
- It gets no environment variables, no descriptor but the socket for calls, limits on CPU time, address space, file
  size, open files and processes, and a wall-clock limit; what it prints goes nowhere.

What holds only where the kernel grants the namespaces (root, or unprivileged user namespaces); `Outcome.missing`
names what it did not grant: no network; the program sees no process but its own, and all of them die with it; it
sees the Python installation, read-only, and an empty directory of 64 MiB, and no other file. Where the evaluation
runs as root, the program runs under a user id of its own, with or without namespaces.

What is not guaranteed: a program that breaks the kernel, or, where namespaces are missing and the harness is not
root, one that kills processes of, reads or deletes files of the user who runs the evaluation. Memory is limited per
process (1 GiB, at most 8 processes), not in sum. A test that takes names other than builtins from the program (a helper
function in a HumanEval prompt) trusts the program with them, as the original harness does. Results of the program's
own classes equal no plain value. On an untrusted model's output, use a virtual machine.
"""

import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from math import comb
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 3.0  # seconds, that of the original harness
STARTUP = 60.0  # seconds, for the processes to start on a busy machine; not part of the program's time
LAUNCHER = Path(__file__).with_name("sandbox_process.py")
FENCES = {
    "network": "no network",
    "processes": "processes of its own",
    "files": "files of its own",
    "ipc": "shared memory of its own",
}

log = logging.getLogger(__name__)
_warned = set()


class Outcome(NamedTuple):
    """What became of one program.

    `missing` names the fences that the kernel did not grant, among "network", "processes", "files", "ipc".
    """

    passed: bool
    reason: str
    seconds: float
    network_isolated: bool
    missing: tuple[str, ...]


def run_program(program: str, tests: str, *, timeout: float = TIMEOUT) -> Outcome:
    """Defines `program` in a sandboxed process, then carries out `tests` against it from another one.

    Args:
        program: text of a module; code under `if __name__ == "__main__"` does not run.
        tests: text that raises unless the program is right; it may call whatever the program defines.
        timeout: wall-clock seconds for program and tests together, from the moment the program starts.

    Raises:
        OSError: the sandbox itself did not start, which says nothing about the program.
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
            reports = [_Lines(process.stdout.fileno()) for process in processes]
            fences = reports[0].read(start + STARTUP)
            reports[1].read(start + STARTUP)
            verdict, reason = reports[1].read(start + STARTUP + timeout) or ("not started", "the sandbox did not start")
        except (TypeError, ValueError):
            verdict, reason, fences = "not started", "the sandbox reported nothing", None
        finally:
            ours.close()
            theirs.close()
            for process in processes:
                _end(process)
            _make_removable(directory)
    if verdict == "not started" or fences is None:
        raise OSError(f"a program could not be run: {reason}")
    missing = tuple(name for name in FENCES if not fences[name])
    _warn(missing)
    return Outcome(verdict == "passed", reason, time.monotonic() - start, fences["network"], missing)


def _launch(role, end, place, timeout, text):
    process = subprocess.Popen(
        [sys.executable, "-I", str(LAUNCHER), role, str(end.fileno()), str(place), str(timeout)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[end.fileno()],
        start_new_session=True,
        # One thread each: numerical libraries start one per core otherwise, which the process limit forbids.
        bufsize=0,  # nothing may be left to flush when the process is gone
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": "/sandbox", "HOME": "/sandbox"},
    )
    data = text.encode(errors="surrogatepass")
    with suppress(BrokenPipeError):  # then nothing is reported either, which is noticed
        process.stdin.write(b"%d\n" % len(data) + data)
    return process


class _Lines:
    """JSON lines of a pipe, each awaited until a deadline; None when the pipe ends or time is up."""

    def __init__(self, descriptor: int):
        self.descriptor, self.data = descriptor, b""

    def read(self, deadline: float):
        while b"\n" not in self.data:
            # poll: select takes no descriptor above 1023.
            poll = select.poll()
            poll.register(self.descriptor, select.POLLIN | select.POLLHUP)
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                return None
            part = os.read(self.descriptor, 2**16)
            if not part:
                return None
            self.data += part
        line, self.data = self.data.split(b"\n", 1)
        return json.loads(line)


def _end(process):
    with suppress(BrokenPipeError):
        process.stdin.close()  # what the process inside waits for
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _make_removable(directory: str):
    """A program may leave folders that cannot be listed; symbolic links are not followed."""
    for folder, names, _ in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                with suppress(OSError):
                    os.chmod(path, 0o700)
    for path in Path(directory).iterdir():
        shutil.rmtree(path, ignore_errors=True)


def _warn(missing: tuple[str, ...]):
    if missing and missing not in _warned:
        _warned.add(missing)
        log.warning(
            "this kernel does not grant the programs that the model wrote %s: a virtual machine would contain them",
            ", ".join(FENCES[name] for name in missing),
        )


class SandboxedCodeEval:
    """Stands in for `evaluate.load("code_eval")`, which runs programs with the rights of the user."""

    def __init__(self, timeout: float = TIMEOUT):
        self.timeout = timeout

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict]]]]:
        """Returns pass@k, the unbiased estimate over all problems, and per problem what became of each program.

        Args:
            references: tests, one text per problem.
            predictions: candidate programs, some per problem.
            k: values of k; those with fewer candidates than k are left out.
        """
        details = defaultdict(list)
        for problem, (tests, candidates) in enumerate(zip(references, predictions, strict=True)):
            for number, program in enumerate(candidates):
                outcome = run_program(program, tests, timeout=self.timeout)
                detail = {"task_id": problem, "passed": outcome.passed, "result": outcome.reason}
                details[problem].append((number, {**detail, "completion_id": number}))
        counts = [(len(found), sum(detail["passed"] for _, detail in found)) for found in details.values()]
        scores = {
            f"pass@{size}": sum(_pass_at(size, *count) for count in counts) / len(counts)
            for size in k
            if counts and all(total >= size for total, _ in counts)
        }
        return scores, dict(details)


def _pass_at(size: int, total: int, correct: int) -> float:
    return 1 - comb(total - correct, size) / comb(total, size)


def code_eval_metric() -> SandboxedCodeEval:
    """What `evaluate.load("code_eval")` gives during a run."""
    return SandboxedCodeEval()
