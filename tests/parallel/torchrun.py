"""Starts a script in several processes, as a user does, and ends all of them when one fails or hangs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def torchrun(ranks: int, script: str, folder: Path, cases: list, timeout: float = 240) -> list[dict]:
    """What each rank of `script` noted in `folder`: it is called with the folder, where `cases.json` is.

    A rank writes `rank-{rank}.json`.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *(str(Path(__file__).with_name(script)), str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
