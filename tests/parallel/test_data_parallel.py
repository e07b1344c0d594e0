"""Data parallel by `accelerate launch`: two processes train as one with the same global batch does.

Models are float64, so that what is compared is the computation and not its rounding: Trainer sums losses in float32,
which is the tolerance for them.
"""

import os
import signal
import time

import pytest
import torch
from helpers import random_attnres
from launching import DDP, finish, largest_error, launcher, outcomes_of, start, train_options
from once import once
from training_cases import ACCUMULATION, ALONE, BASE, CHECKPOINTING, EXACT, MODELS

from attnres import AttnResForCausalLM

LOSSES = {"rel": 1e-6}
WEIGHTS = 1e-9
CASES = {name: ALONE[name] for name in (*MODELS, "frozen-backbone", "zero-pseudo-queries", "float32")}
# What must not change anything: compared with BASE in one process.
SAME = {
    "accumulation": {**EXACT, "options": ACCUMULATION},
    **{name: {**EXACT, "options": options} for name, options in CHECKPOINTING.items()},
}


@pytest.fixture(scope="module")
def saved_and_ranks(material, tmp_path_factory):
    def make(folder):
        command = {"command": ["train", *train_options(material, folder / "trained", 2)]}
        return folder, outcomes_of({**CASES, **SAME, "command": command}, folder, launcher(*DDP))

    return once(tmp_path_factory, "data-ranks", make)


@pytest.fixture(scope="module")
def ranks(saved_and_ranks):
    return saved_and_ranks[1]


@pytest.mark.parametrize("name", [*CASES, *SAME])
def test_two_processes_train_as_one_with_the_same_global_batch(alone, ranks, name):
    expected = alone.get(name, alone[BASE])
    assert len(ranks) == 2
    rounding, losses = (1e-4, {"rel": 1e-5}) if name == "float32" else (WEIGHTS, LOSSES)
    for outcome in (rank[name] for rank in ranks):
        assert outcome["wrapper"] == "DistributedDataParallel"
        assert len(outcome["losses"]) == 4
        assert outcome["losses"] == pytest.approx(expected["losses"], **losses)
        assert largest_error(outcome["weights"], expected["weights"]) < rounding
    assert largest_error(ranks[0][name]["weights"], ranks[1][name]["weights"]) == 0


@pytest.mark.parametrize("name", [name for name in CASES if "standard" not in name])
def test_the_depth_mixers_gradients_are_those_of_the_global_batch(alone, ranks, name):
    for outcome in (rank[name] for rank in ranks):
        found = {key: value for key, value in outcome["gradients"].items() if "depth_mixer" in key}
        assert len(found) == 6
        for key, gradient in found.items():  # that of a gain is a multiple of its pseudo-query
            assert gradient.any() == (name != "zero-pseudo-queries" or key.endswith("query")), key
        expected = {key: alone[name]["gradients"][key] for key in found}
        assert largest_error(found, expected) < (1e-5 if name == "float32" else WEIGHTS)


def test_a_frozen_backbone_stays_while_its_depth_mixer_trains(ranks):
    start_weights = {name: tensor.double() for name, tensor in random_attnres("qwen3").named_parameters()}
    for rank in ranks:
        for name, tensor in rank["frozen-backbone"]["weights"].items():
            assert torch.equal(tensor, start_weights[name]) == ("depth_mixer" not in name), name
        assert all("depth_mixer" in name for name in rank["frozen-backbone"]["gradients"])


def test_attnres_train_gives_the_model_of_one_process(trained_alone, saved_and_ranks):
    folder, ranks = saved_and_ranks
    assert ["step 3: loss" in rank["command"]["said"] for rank in ranks] == [True, False]
    one, two = (AttnResForCausalLM.from_pretrained(path) for path in (trained_alone, folder / "trained"))
    assert largest_error(dict(two.named_parameters()), dict(one.named_parameters())) < 1e-4


@pytest.mark.slow
def test_a_lost_process_ends_the_job_within_a_minute_and_leaves_whole_checkpoints(material, tmp_path):
    options = [*train_options(material, tmp_path / "run", 2), "--max-steps", 100000, "--save-steps", 2]
    process = start(*launcher(*DDP), "-m", "attnres", "train", *options)
    try:
        wait_for(lambda: (tmp_path / "run" / "checkpoint-4").is_dir(), process)
        lost = max(workers_of(process.pid))  # the one started last
        os.kill(lost, signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=60)
    finally:
        finish(process, timeout=1)
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    assert f"Signal 9 (SIGKILL) received by PID {lost}" in output
    assert not workers_of(process.pid)
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        AttnResForCausalLM.from_pretrained(checkpoint)
        assert (checkpoint / "optimizer.pt").is_file() and (checkpoint / "trainer_state.json").is_file()


def wait_for(condition, process, timeout: float = 120):
    limit = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stdout.read()[-6000:]
        assert time.monotonic() < limit
        time.sleep(0.05)


def workers_of(launcher_pid: int) -> list[int]:
    """Its direct children that train; torchrun starts helpers besides."""
    found = []
    for stat in os.listdir("/proc"):
        if not stat.isdigit():
            continue
        try:
            with open(f"/proc/{stat}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{stat}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if parent == launcher_pid and "attnres" in command:
            found.append(int(stat))
    return found
