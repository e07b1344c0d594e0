"""The launcher of one sandboxed process: sets up the fences, then runs `serve` or `check` inside.

It runs as a script, `python -I sandbox_process.py ROLE FD DIRECTORY TIMEOUT`, without the harness's environment.
Standard input carries the length of the text in bytes, a newline and the text, and stays open: everything inside ends
when it closes, because the harness closed it or died. Standard output carries lines of JSON: the fences that stand and,
from the checker, the verdict.

    harness -> launcher -> process 1 of a PID namespace, which waits for standard input -> the program, process 2

The fences, each set up if the kernel allows it: PID, mount, network and IPC namespaces (in a user namespace unless run
by root), a root folder with the Python installation, read-only, and one small writable folder, a user id of its own if
run by root, no capabilities, no new privileges, and resource limits.
"""

import ctypes
import json
import math
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sandbox_protocol

del sys.path[0]  # a program that imports `statistics` means the standard library's, not the file beside this one

MEMORY_BYTES = 2**30
FILE_BYTES = 16 * 2**20
DIRECTORY_BYTES = 64 * 2**20
PROCESSES = 8
OPEN_FILES = 64
WRITABLE = "/sandbox"

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 2**30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 2**18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments):
    """Calls a function of the C library; raises OSError if it fails."""
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def attempt(action, *arguments) -> bool:
    """Returns whether an action succeeded."""
    try:
        action(*arguments)
    except OSError:
        return False
    return True


def main(role: str, descriptor: str, directory: str, timeout: str):
    text = sys.stdin.buffer.read(int(sys.stdin.buffer.readline())).decode(errors="surrogatepass")
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the first to be killed when memory runs out
    fences = raise_namespaces()
    child = os.fork()
    if child == 0:
        inside(role, int(descriptor), directory, float(timeout), text, fences)
    os.close(int(descriptor))  # so that the other end notices when the program's process has ended
    os.waitpid(child, 0)
    if not fences["processes"]:
        kill_descendants()


def raise_namespaces() -> dict[str, bool]:
    """Enters namespaces for processes, mounts, network and IPC; returns which of them the kernel granted."""
    flags = {"processes": CLONE_NEWPID, "files": CLONE_NEWNS, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC}
    if os.geteuid() == 0 and attempt(call, "unshare", sum(flags.values())):
        return dict.fromkeys(flags, True)
    user, group = os.geteuid(), os.getegid()
    if attempt(call, "unshare", CLONE_NEWUSER):
        # The user is mapped to itself, not to root, so that executing a file regains no capabilities.
        attempt(Path("/proc/self/setgroups").write_text, "deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return {name: attempt(call, "unshare", flag) for name, flag in flags.items()}


def inside(role: str, descriptor: int, directory: str, timeout: float, text: str, fences: dict[str, bool]):
    """Runs process 1 of the namespace: forks the program, and ends with all processes when standard input closes."""
    if not fences["processes"]:
        attempt(call, "prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    attempt(call, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    fences["files"] = fences["files"] and attempt(new_root, directory)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    directory = WRITABLE if fences["files"] else directory
    user = own_user(directory, fences)
    report = os.dup(1)
    write_line(report, fences)
    child = os.fork()
    if child:
        os.close(descriptor)
        os.read(0, 1)
        if not fences["processes"]:
            attempt(os.killpg, child, signal.SIGKILL)
            kill_descendants(user)
        os._exit(0)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # The program must not hold the pipe of the verdict.
        confine(directory, user, timeout, {descriptor} if role == "serve" else {descriptor, report})
        connection = socket.socket(fileno=descriptor)
        if role == "serve":
            sandbox_protocol.serve(connection, text)
        else:
            sandbox_protocol.check(connection, text, timeout, lambda *verdict: write_line(report, verdict))
    finally:
        os._exit(1)


def write_line(descriptor: int, content):
    os.write(descriptor, json.dumps(content).encode() + b"\n")


def own_user(directory: str, fences: dict[str, bool]) -> int | None:
    """Gives the folder to an unused user id, so that the process limit counts this program alone; None without root."""
    if os.geteuid() != 0:
        return None
    own = int.from_bytes(os.urandom(3), "big") if fences["processes"] else os.getppid()
    return next((user for user in (10**9 + own, 65534) if attempt(os.chown, directory, user, user)), None)


def confine(directory: str, user: int | None, timeout: float, keep: set[int]):
    """Gives up all rights, which cannot be regained, before the program runs."""
    os.setsid()
    os.chdir(directory)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    first = 3
    for kept in (*sorted(keep), 2**16):
        os.closerange(first, kept)
        first = kept + 1
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    attempt(call, "capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    attempt(call, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Other processes of the same user can neither trace this one nor read its memory.
    attempt(call, "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    attempt(call, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for kind, limit in (
        (resource.RLIMIT_CPU, math.ceil(timeout) + 1),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def new_root(directory: str):
    """Changes to a root folder with only the Python installation, the C library and one writable folder."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime"):
        if os.path.islink(path):
            make_parent(directory + path)
            os.symlink(os.readlink(path), directory + path)
        elif os.path.exists(path):
            show(path, directory)
    for path in sorted({sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}):
        if not os.path.exists(directory + path):
            show(path, directory)
    for name in ("null", "zero", "full", "random", "urandom"):
        make_parent(f"{directory}/dev/{name}")
        Path(f"{directory}/dev/{name}").touch()
        mount(f"/dev/{name}", f"{directory}/dev/{name}", None, MS_BIND)
    # Data sets shipped with this package hold the answers.
    package = directory + str(Path(__file__).resolve().parents[1])
    if os.path.isdir(package):
        mount("tmpfs", package, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=555")
    os.mkdir(directory + "/proc")
    with suppress(OSError):  # a container that hides parts of its own /proc allows no new one
        mount("proc", directory + "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(directory + WRITABLE)
    options = f"size={DIRECTORY_BYTES},nr_inodes=1024,mode=700"
    mount("tmpfs", directory + WRITABLE, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(directory)
    mount(None, directory, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def show(path: str, root: str):
    """Mounts `path` read-only under `root`, with all that is mounted below it."""
    if os.path.isdir(path):
        os.makedirs(root + path, exist_ok=True)
    else:
        make_parent(root + path)
        Path(root + path).touch()
    mount(os.path.realpath(path), root + path, None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)
    try:
        call("syscall", SYS_MOUNT_SETATTR, -100, (root + path).encode(), AT_RECURSIVE, attributes, 32)
    except OSError:  # before Linux 5.12
        mount(None, root + path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def make_parent(path: str):
    os.makedirs(os.path.dirname(path), exist_ok=True)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None):
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def kill_descendants(user: int | None = None):
    """Kills what the program started without a PID namespace: by its user id if it has one, and by parentage."""
    if user is not None:
        child = os.fork()
        if child == 0:
            os.setresuid(user, user, user)
            attempt(os.kill, -1, signal.SIGKILL)
            os._exit(0)
    for _ in range(20):
        try:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        except OSError:
            return
        for child in children:
            attempt(os.kill, int(child), signal.SIGKILL)
        if not children:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
