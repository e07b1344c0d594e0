"""Several processes: the same prompts, batches and scores as one, and no process that waits for one that is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnres.eval import evaluate, records

ROWS = ("arc_challenge", "gsm8k")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
IN_EACH_PROCESS = Path(__file__).with_name("in_each_process.py")


def launch(*arguments):
    return subprocess.run(
        [sys.executable, *LAUNCH, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a process that waited for one that is gone would take longer
    )


def outcomes(folder) -> list[dict]:
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(checkpoint, mirror_root, tmp_path_factory):
    """The folder that one process writes."""
    out = tmp_path_factory.mktemp("alone")
    evaluate(
        str(checkpoint), ",".join(ROWS), out=out, data_dir=mirror_root, max_length=900, batch_size=2, progress=False
    )
    return out


def test_accelerate_launch_gives_the_bytes_of_one_process_and_says_everything_once(
    alone, checkpoint, mirror_root, tmp_path
):
    options = ["--suite", ",".join(ROWS), "--data-dir", mirror_root, "--max-length", 900, "--batch-size", 2]
    done = launch("-m", "attnres", "eval", checkpoint, *options, "--out", tmp_path)
    assert done.returncode == 0 and done.stdout.count("| GSM8K |") == 1
    assert done.stderr.count("Loading weights: 100%") == 1 and done.stderr.count(f"loading {checkpoint}\n") == 1
    assert "exceeds model's maximum length" not in done.stderr  # counted, see prompts_cut
    for row in ROWS:
        assert (tmp_path / row / "samples.jsonl").read_bytes() == (alone / row / "samples.jsonl").read_bytes()
        one, two = (records.read_result(folder / row) for folder in (alone, tmp_path))
        assert two["model"].pop("processes") == 2 and one["model"].pop("processes") == 1
        same = ("score", "tasks", "secondary", "fingerprint", "model", "tokens", "prompts_cut", "answers_short")
        assert [two[key] for key in same] == [one[key] for key in same]


def test_an_error_in_one_share_fails_the_row_and_not_the_run(alone, checkpoint, mirror_root, tmp_path):
    done = launch(IN_EACH_PROCESS, "nan", checkpoint, mirror_root, tmp_path)
    assert done.returncode == 0
    first, second = outcomes(tmp_path)
    assert first["failed"] == {"arc_challenge": "ArithmeticError: the model's logits are NaN"}
    assert first["rows"] == {"gsm8k": records.read_result(alone / "gsm8k")["score"]["value"]}
    assert {**first, "writes": False} == second
    assert "in another process" in (tmp_path / "arc_challenge" / "failure.txt").read_text()


def test_a_killed_process_ends_the_run_and_keeps_finished_rows(checkpoint, mirror_root, tmp_path):
    done = launch(IN_EACH_PROCESS, "lost", checkpoint, mirror_root, tmp_path)
    assert done.returncode != 0
    assert "finished rows are kept; run the same command again to continue" in done.stderr
    assert records.read_result(tmp_path / "arc_challenge") and not (tmp_path / "gsm8k").exists()


@pytest.mark.slow
def test_a_mistake_ends_all_processes(checkpoint, tmp_path):
    done = launch("-m", "attnres", "eval", checkpoint, "--data-dir", tmp_path / "nowhere", "--out", tmp_path)
    assert done.returncode != 0 and "nowhere: no such folder" in done.stderr
