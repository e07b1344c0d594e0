"""Programs that a model might write, and some that it had better not."""
# ruff: noqa: E501 (the programs)

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnres.eval import driver, sandbox
from attnres.eval.sandbox import SandboxedCodeEval, run_program

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"
RIGHT = "def add(a, b):\n    return a + b\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")


@pytest.fixture(scope="session")
def fences():
    """What this kernel grants."""
    return run_program(RIGHT, TESTS)


@pytest.fixture
def needs(fences):
    def check(*names):
        if lacking := set(names) & set(fences.missing):
            pytest.skip(f"not granted by this kernel: {', '.join(lacking)}")

    return check


def test_a_right_program_passes():
    outcome = run_program(RIGHT, TESTS)
    assert outcome.passed and outcome.reason == "passed" and 0 < outcome.seconds < 30


def test_a_wrong_program_fails_with_the_line_that_failed():
    outcome = run_program("def add(a, b):\n    return a * b\n", TESTS)
    assert not outcome.passed
    assert outcome.reason == "AssertionError: assert add(2, 3) == 5"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(x): x.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"),
        ("def f(n):\n    while n: yield n; n -= 1", "assert list(f(3)) == [3, 2, 1]\nassert sum(f(4)) == 10"),
        ("def f(): raise KeyError('x')", "try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False"),
        ("class Pair:\n    def __init__(s, a, b): s.a, s.b = a, b\ndef f(ps): return sum(p.a for p in ps)",
         "p = Pair(1, 2)\np.a = 5\nassert f([p, Pair(2, 2)]) == 7 and p.b == 2"),
        ("import math\ndef poly(c, x): return sum(a * x**i for i, a in enumerate(c))\ndef f(c): return -c[0] / c[1]",
         "def check(candidate):\n    assert math.fabs(poly([1, 2], candidate([1, 2]))) < 1e-4\ncheck(f)"),
        ("from math import *\nfrom typing import List\ndef f(x: List[int]): return {1: (2, {3}), None: [b'x', 1j, inf]}",
         "assert f([]) == {1: (2, {3}), None: [b'x', 1j, float('inf')]}"),
        ("def f(n): return 10**n", "assert f(9000) == 10**9000"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int' = 1\ndef f(): return P()",
         "assert f() == P() and f() != P(2) and f().x == 1"),
        ("import re, datetime\ndef f(s): return re.match('a+', s)", "assert f('aab').group() == 'aa'\nassert not f('b')"),
        ("def f(x):\n    '''text: ä \\ud800'''\n    return x + 'ü'", "assert f('ä') == 'äü'"),
        ("def f(g): return [x for x in g]", "assert f({}) == [] and f((1,)) == [1] and f('ab') == ['a', 'b']"),
    ],
)  # fmt: skip
def test_what_honest_programs_do_works_across_the_two_processes(program, tests):
    outcome = run_program(program, tests, timeout=10)
    assert outcome.passed, outcome.reason


CHEATS = {
    "exit before the tests": "import sys\nsys.exit(0)",
    "hard exit before the tests": "import os\nos._exit(0)",
    "exit in the function": "def add(a, b):\n    raise SystemExit(0)",
    "hard exit in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "exit handler": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(a, b): return 0",
    "text that looks like success": "print('passed', flush=True)\nprint('[\"passed\", \"passed\"]', flush=True)",
    "equal to everything": "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "object equal to everything": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "own assertion": "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = AssertionError\n"
    "def add(a, b): return 0",
    "own builtins": "def abs(x): return 0\ndef add(a, b): return 9",
    "no tracebacks": "import sys\nsys.excepthook = lambda *_: None\nsys.settrace(lambda *_: None)\ndef add(a, b): return 0",
    "frames of the caller": "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_globals.update(Values=None)\n        frame = frame.f_back\n    return 0",
    "patched protocol": "import sandbox_protocol as p\np.send = lambda c, m: c.sendall(b'\\0\\0\\0\\x08\"passed\"')",
    "writes to every descriptor": 'import os\nfor n in range(64):\n    try: os.write(n, b\'["passed", "passed"]\\n\')\n'
    "    except OSError: pass",
    "patched exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef add(a, b): return 0",
    "no program": "",
    "no Python": "def add(a, b:\n",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS)
def test_a_program_that_fakes_success_fails(program):
    outcome = run_program(program, "assert abs(add(2, 3)) == 5\n")
    assert not outcome.passed and outcome.reason


HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop in the function": "def add(a, b):\n    while True: pass",
    "deaf to signals": "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "daemons": "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        os.setsid()\n"
    "        if os.fork() == 0: time.sleep(77.25)\n        os._exit(0)\nos._exit(0)",
    "100 GB of memory": "x = bytearray(100 * 10**9)",
    "memory without end": "x = []\nwhile True: x.append(bytearray(10**6))",
    "10 GB file": "with open('big', 'wb') as file:\n    for _ in range(10**4): file.write(bytes(10**6))",
    "files without end": "import itertools\nfor n in itertools.count():\n    with open(str(n), 'wb') as file: file.write(bytes(10**6))",
    "output without end": "import os\nwhile True: print('x' * 10**6); os.write(2, b'x' * 10**6)",
    "messages without end": "import gc, socket\nfor s in gc.get_objects():\n    if isinstance(s, socket.socket):\n"
    "        while True: s.sendall(b'\\0' * 10**6)",
    "kills its parent": "import os, signal\nfor p in (os.getppid(), 1):\n    for n in (15, 9, 19):\n"
    "        try: os.kill(p, n)\n        except OSError: pass\nraise SystemExit",
    "kills everything": "import os\ntry: os.kill(-1, 9)\nfinally: os.kill(os.getpid(), 9)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "folders that cannot be listed": "import os\nos.makedirs('a/b')\nos.chmod('a', 0)\nos.symlink('/', 'root')",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_fails_and_hurts_nothing(program, needs, tmp_path, monkeypatch):
    if "fork" in program or "-1" in program:
        needs("processes")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    start = time.monotonic()
    outcome = run_program(program, TESTS, timeout=0.5)
    assert not outcome.passed and outcome.reason
    assert time.monotonic() - start < 20
    assert not list(tmp_path.iterdir())
    assert not descendants()
    assert run_program(RIGHT, TESTS).passed


def descendants():
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [child for child in path.read_text().split() if "sandbox_process" in command(child)]


def command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_no_process_of_a_program_is_left(needs):
    needs("processes")
    run_program(HOSTILE["daemons"], TESTS, timeout=1)
    run_program(HOSTILE["fork bomb"], TESTS, timeout=1)
    deadline = time.monotonic() + 5
    while left := [name for name in os.listdir("/proc") if name.isdigit() and "sandbox_process" in command(name)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def secret_reader(expression):
    """A program that fails with what `expression` gives."""
    return f"import os, socket, glob\nraise ValueError(repr({expression}))"


def test_the_environment_and_the_parents_environment_are_out_of_reach(monkeypatch, needs):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = run_program(secret_reader("dict(os.environ)"), TESTS)
    assert "OMP_NUM_THREADS" in outcome.reason and "secret" not in outcome.reason
    needs("processes", "files")
    environments = "[p for p in glob.glob('/proc/[0-9]*/environ') if os.access(p, os.R_OK) and open(p,'rb').read()]"
    for expression in (f"len({environments})", "open(f'/proc/{os.getppid()}/environ').read()"):
        outcome = run_program(secret_reader(expression), TESTS)
        assert "secret" not in outcome.reason
    assert "Permission" in outcome.reason or "No such file" in outcome.reason
    real = run_program(secret_reader(f"open('/proc/{os.getpid()}/environ').read()"), TESTS)
    assert "No such file" in real.reason


def test_files_outside_can_neither_be_read_nor_deleted(tmp_path, needs):
    needs("files")
    (tmp_path / "kept").write_text("kept")
    tmp_path.chmod(0o777)
    outcome = run_program(f"import os\nos.remove({str(tmp_path / 'kept')!r})", TESTS)
    assert "No such file" in outcome.reason
    wipe = "import os, shutil\nshutil.rmtree('/', ignore_errors=True)\nos.mkdir('/usr/new')"
    outcome = run_program(wipe, TESTS)
    # A large file system is not walked to its end in time.
    assert any(reason in outcome.reason for reason in ("Read-only", "Permission", "not finished"))
    assert (tmp_path / "kept").read_text() == "kept"
    # An interpreter in a virtual environment below the working directory is there; nothing else of that folder is.
    reason = run_program(secret_reader(f"os.listdir({str(Path.cwd())!r})"), TESTS).reason
    assert "No such file" in reason or reason == f"ValueError: [{Path(sys.prefix).name!r}]"


def test_the_working_directory_is_empty_and_its_own():
    program = "import os\nopen('x', 'w').close()\nraise ValueError(str(os.listdir('.')))"
    assert [run_program(program, TESTS).reason for _ in range(2)] == ["ValueError: ['x']"] * 2


def test_there_is_no_network(needs):
    needs("network")
    server = socket.create_server(("127.0.0.1", 0))
    call = f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
    outcome = run_program(secret_reader(call), TESTS)
    assert "unreachable" in outcome.reason
    socket.create_connection(server.getsockname()).close()  # the same call from here succeeds
    server.close()


def test_no_rights_are_left_to_a_program(needs):
    needs("files")
    lines = "[l for l in open('/proc/self/status') if l.startswith(('CapEff', 'CapPrm', 'NoNewPrivs'))]"
    reason = run_program("import os\nos.listdir('.')\n" + secret_reader(lines), TESTS).reason
    assert reason.count("0000000000000000") == 2 and r"NoNewPrivs:\t1" in reason
    assert "root" not in run_program(secret_reader("os.getuid() or 'root'"), TESTS).reason


def test_the_evaluations_own_limits_stay_as_they_were():
    before = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC)]
    run_program(RIGHT, TESTS)
    after = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC)]
    assert before == after


def test_everything_ends_when_the_evaluation_is_killed(needs):
    needs("processes")
    harness = "import runpy, sys\nrunpy.run_path(sys.argv[1])['run_program']('while True: pass', '', timeout=60.0)"
    process = subprocess.Popen([sys.executable, "-c", harness, sandbox.__file__])

    def running():
        return [n for n in os.listdir("/proc") if n.isdigit() and command(n).endswith("60.0\0")]

    deadline = time.monotonic() + 120
    while len(running()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running()
    process.kill()
    process.wait()
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running()


def test_a_kernel_without_namespaces_is_reported_and_programs_still_run(monkeypatch, tmp_path):
    """The launcher is replaced by one whose unshare is refused, as inside most containers."""
    folder = Path(sandbox.LAUNCHER).parent
    for name in ("sandbox_process.py", "sandbox_protocol.py"):
        text = (folder / name).read_text()
        refused = 'def call(name: str, *arguments):\n    if name == "unshare":\n        raise OSError("refused")\n'
        (tmp_path / name).write_text(text.replace("def call(name: str, *arguments):\n", refused))
    monkeypatch.setattr(sandbox, "LAUNCHER", tmp_path / "sandbox_process.py")
    # What lies beside the launcher hides no module of the standard library.
    assert run_program(f"import sys\nassert {str(tmp_path)!r} not in sys.path\n{RIGHT}", TESTS).passed
    lines = []
    assert set(driver._missing_fences(lines.append)) == {"network", "processes", "files", "ipc"}
    assert len(lines) == 1 and "no network" in lines[0]
    for name in ("hard exit before the tests", "equal to everything"):
        assert not run_program(CHEATS[name], "assert add(1, 1) == 2").passed
    assert "secret" not in run_program(HOSTILE["endless loop"], TESTS, timeout=1).reason


def test_a_sandbox_that_does_not_start_is_no_failure_of_the_program(monkeypatch, tmp_path):
    (tmp_path / "launcher.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(sandbox, "LAUNCHER", tmp_path / "launcher.py")
    with pytest.raises(OSError, match="could not be run"):
        run_program(RIGHT, TESTS)


def test_code_eval_counts_as_the_original_does():
    scores, outcomes = SandboxedCodeEval().compute(
        references=[TESTS, TESTS], predictions=[[RIGHT, "x", "y"], ["x", "y", "z"]], k=[1, 2, 10]
    )
    assert scores == pytest.approx({"pass@1": (1 / 3) / 2, "pass@2": (2 / 3) / 2})
    assert [outcome.passed for outcome in outcomes[0]] == [True, False, False]
