"""`attnres bench pipeline`: what crosses is counted, and stands beside the paper's formulas."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from once import once

from attnres.cli import main
from attnres.configuration_attnres import AttnResConfig
from attnres.parallel.traffic import cached_blocks, naive_blocks, plan_routes, split_layers

SMALL = ["--hidden-size", "64", "--tokens", "8"]


def config_of(mode, layers, per_block):
    backbone = {"model_type": "llama", "num_hidden_layers": layers}
    return AttnResConfig(backbone_config=backbone, residual_mode=mode, layers_per_block=per_block)


def crossings(mode, ranks, virtual, layers, per_block, caching):
    """Sources and partial sums that cross, over all stages."""
    bounds = split_layers(layers, ranks * virtual)
    routes = plan_routes(config_of(mode, layers, per_block), bounds, ranks, caching)
    return sum(len(route.sent) for route in routes), sum(route.partial_sent for route in routes)


@pytest.mark.parametrize(("ranks", "virtual", "naive", "cached"), [(4, 2, 28, 22), (4, 1, 6, 6), (2, 3, 15, 9)])
def test_formulas_are_the_papers(ranks, virtual, naive, cached):
    assert naive_blocks(ranks, virtual, 1) == naive and cached_blocks(ranks, virtual, 1) == cached
    assert naive_blocks(ranks, virtual, 3) == 3 * naive and cached_blocks(ranks, virtual, 3) == 3 * cached


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_what_is_planned_differs_from_the_formulas_by_the_embedding_and_own_blocks(ranks, virtual):
    stages = ranks * virtual
    for blocks in (1, 2):
        shape = ("block", ranks, virtual, stages * blocks * 2, 2)
        assert crossings(*shape, caching=False) == (naive_blocks(ranks, virtual, blocks) + stages - 1, 0)
        own = (virtual - 1) * ranks * blocks
        assert crossings(*shape, caching=True) == (cached_blocks(ranks, virtual, blocks) + ranks - 1 - own, 0)


def test_blocks_that_straddle_stages_cross_as_partial_sums_and_standard_ones_as_hidden_states():
    assert crossings("block", 2, 1, 4, 3, caching=True) == (1, 1)  # embedding and half of a block
    assert crossings("block", 2, 1, 4, 4, caching=True) == (1, 1)
    assert crossings("block", 2, 1, 4, 2, caching=True) == (2, 0)
    assert crossings("standard", 2, 2, 4, 2, caching=True) == (0, 3)
    assert crossings("full", 2, 1, 4, 2, caching=True) == (5, 0)


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(7, 4, [0, 2, 4, 6, 7]), (11, 8, [0, 2, 4, 6, 7, 8, 9, 10, 11]), (2, 2, [0, 1, 2])],
)
def test_layers_are_split_as_evenly_as_they_can_be(layers, stages, expected):
    assert split_layers(layers, stages) == expected


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return once(tmp_path_factory, "pipeline-bench", measure)


def measure(_):
    """4 ranks with 2 virtual stages, 11 layers in blocks of 2: neither divides."""
    arguments = [
        "bench",
        "pipeline",
        "--ranks",
        "4",
        "--virtual-stages",
        "2",
        "--layers",
        "11",
        "--rounds",
        "1",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "attnres", *arguments, *SMALL],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "attnres: round 1 of 1" in done.stderr and "Warning" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize(("way", "formula"), [("naive", naive_blocks), ("cached", cached_blocks)])
def test_measured_bytes_are_those_planned_and_stand_beside_the_formula(measured, mode, way, formula):
    found = measured["traffic"][mode][way]
    sources, partials = crossings(mode, 4, 2, 11, 2, caching=way == "cached")
    size = 64 * 4
    assert found["forward_bytes_per_token"] == found["backward_bytes_per_token"] == (sources + partials) * size
    per_stage = (6 if mode == "block" else 22) / 8
    assert found["blocks_per_stage"] == per_stage
    assert found["formula_bytes_per_token"] == formula(4, 2, per_stage) * size
    difference = found["difference_bytes_per_token"]
    assert found["formula_bytes_per_token"] + sum(difference.values()) == pytest.approx(
        found["forward_bytes_per_token"]
    )
    assert difference["embedding"] == (7 if way == "naive" else 3) * size
    assert difference["partial_sums"] == partials * size


def test_standard_residuals_cross_once_per_stage_and_store_nothing(measured):
    found = measured["traffic"]["standard"]["cached"]
    assert found["forward_bytes_per_token"] == 7 * 64 * 4
    assert found["stored_blocks_peak_per_rank"] == found["alive_blocks_peak_per_rank"] == [0] * 4


@pytest.mark.parametrize("mode", ["block", "full"])
def test_peaks_of_stored_blocks_are_told_for_each_rank(measured, mode):
    naive, cached = (measured["traffic"][mode][way] for way in ("naive", "cached"))
    assert naive["stored_blocks_peak_per_rank"] == [0] * 4
    stored, alive = cached["stored_blocks_peak_per_rank"], cached["alive_blocks_peak_per_rank"]
    assert all(0 < less <= more for less, more in zip(stored, alive, strict=True))


def test_time_is_a_ratio_to_standard_residuals_of_the_same_round(measured):
    arms = measured["wall_clock"]["arms"]
    assert measured["wall_clock"]["goal"] == 0.04 and list(arms) == ["standard", "block", "full"]
    assert arms["standard"]["overhead"] == 0 and all(len(arm["overhead_of_rounds"]) == 1 for arm in arms.values())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks", "1"], "ranks must be at least 2, got 1"),
        (["--layers", "7"], "num_hidden_layers=7 are fewer than the 8 stages"),
        (["--layers-per-block", "17"], "layers_per_block must be between 1 and num_hidden_layers=16"),
        (["--schedule", "zb"], "schedule must be one of gpipe, 1f1b, interleaved-1f1b, got 'zb'"),
        (["--micro-batches", "9"], "micro_batches=9 must be a multiple of 2"),
        (["--modes", "block,best"], "modes must be some of block, full, got best"),
        (["--modes", "standard"], "modes must be some of block, full, got standard"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, got 'int8'"),
        (["--hidden-size", "100"], "hidden_size must be a multiple of 64, got 100"),
        (["--tokens", "1"], "tokens must be at least 2, got 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, line, capsys):
    assert main(["bench", "pipeline", *arguments]) == 2
    out, errors = capsys.readouterr()
    assert not out and line in errors and errors.count("\n") == 1


def test_a_lost_rank_ends_the_command_with_one_line():
    options = ["--ranks", "2", "--modes", "block", "--rounds", "100000", *SMALL]
    command = [sys.executable, "-m", "attnres", "bench", "pipeline", *options]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stderr:
            if "round 3 " in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        os.kill(ranks[-1], signal.SIGKILL)
        started = time.monotonic()
        out, errors = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    said = [line for line in errors.splitlines() if not re.match(r"attnres: round \d+ of", line)]
    assert process.returncode == 1 and not out and time.monotonic() - started < 30
    assert said == ["attnres: error: rank 1 is lost: its process was ended by SIGKILL"]
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
