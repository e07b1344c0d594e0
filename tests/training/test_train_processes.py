"""Tests runs of two processes, which print everything once and stop or continue together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from once import once
from tiny_train import command_line, log, same_weights

RANKS = Path(__file__).with_name("training_ranks.py")
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def launch(*arguments, data_cache):
    paths = [str(ROOT), str(ROOT / "tests"), str(RANKS.parent)]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(data_cache),
        "CUDA_VISIBLE_DEVICES": "",
    }
    started = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, 9)
        raise
    return started.returncode, out, err


@pytest.fixture(scope="module")
def ranks(mixture, documents, data_cache, tmp_path_factory):
    """Results of both processes, their folder, and their stderr."""

    def make(top):
        status, _, err = launch(*TORCHRUN, RANKS, mixture, documents, top, data_cache=data_cache)
        assert status == 0, err[-3000:]
        return [json.loads((top / f"outcome-{rank}.json").read_text()) for rank in range(2)], top, err

    return once(tmp_path_factory, "train-ranks", make)


def test_a_run_of_two_processes_is_resumed_to_the_bit(ranks):
    _, top, _ = ranks
    assert len(log(top / "whole")) == 6
    assert log(top / "resumed") == log(top / "whole")
    assert same_weights(top / "resumed", top / "whole")


def test_a_loss_that_is_not_finite_in_one_process_stops_both_and_is_said_once(ranks):
    outcomes, top, err = ranks
    assert [outcome["status"] for outcome in outcomes] == [1, 1]
    last = top / "nan" / "checkpoint-2"
    assert err.count(f"stopped: step 3: the loss is NaN or infinite; the last good checkpoint is {last}") == 1
    assert [path.name for path in (top / "nan").glob("checkpoint-*")] == ["checkpoint-2"]


def test_muon_steps_divided_parameters_as_it_steps_whole_ones(ranks):
    """Newton-Schulz rounds to bfloat16, and a sharded matrix is summed in another order."""
    for outcome in ranks[0]:
        assert outcome["muon"]["stack"] == 0.0  # each process has whole matrices
        assert outcome["muon"]["matrix"] < 1e-3


def test_accelerate_launch_trains_and_says_everything_once(plain, documents, data_cache, tmp_path):
    out = tmp_path / "run"
    line = command_line(plain, documents, out, eval_fraction=0.2, use_cpu=None)
    status, said, err = launch(*ACCELERATE, "-m", "attnres", "train", *line, data_cache=data_cache)
    assert status == 0, err[-3000:]
    assert said.splitlines()[0].startswith(f"{out}: 6 steps, training loss ")
    assert said.count("training loss") == err.count("step 3: loss") == 1
    assert (out / "checkpoint-6" / "rng_state_1.pth").is_file()

    status, _, err = launch(*ACCELERATE, "-m", "attnres", "train", *line, data_cache=data_cache)
    assert status != 0
    assert err.count(f"attnres: error: {out}: is not empty") == 1
