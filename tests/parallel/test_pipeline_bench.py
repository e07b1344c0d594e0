"""What pipeline stages send: as planned, and as benchmarks/pipeline.py counts it beside the paper's formulas."""

import io
import json
import sys
from contextlib import redirect_stdout
from unittest.mock import patch

import pytest
from once import once
from pipeline import cached_blocks, main, naive_blocks

from attnres.configuration_attnres import AttnResConfig
from attnres.parallel.traffic import plan_routes, split_layers


def crossings(mode, ranks, virtual, layers, per_block, caching):
    """Sources and partial sums that cross, over all stages."""
    backbone = {"model_type": "llama", "num_hidden_layers": layers}
    config = AttnResConfig(backbone_config=backbone, residual_mode=mode, layers_per_block=per_block)
    routes = plan_routes(config, split_layers(layers, ranks * virtual), ranks, caching)
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
    """2 ranks with 4 virtual stages, 11 layers in blocks of 2: neither divides."""
    sizes = "--ranks 2 --virtual-stages 4 --layers 11 --hidden-size 64 --tokens 8 --rounds 1 --json"
    with patch.object(sys, "argv", ["pipeline.py", *sizes.split()]), redirect_stdout(io.StringIO()) as printed:
        main()
    return json.loads(printed.getvalue())


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize(("way", "formula"), [("naive", naive_blocks), ("cached", cached_blocks)])
def test_measured_bytes_are_those_planned_and_stand_beside_the_formula(measured, mode, way, formula):
    found = measured["traffic"][f"{mode}, {way}"]
    sources, partials = crossings(mode, 2, 4, 11, 2, caching=way == "cached")
    size = 64 * 4
    assert found["forward_bytes_per_token"] == found["backward_bytes_per_token"] == (sources + partials) * size
    per_stage = (6 if mode == "block" else 22) / 8
    assert found["formula_bytes_per_token"] == formula(2, 4, per_stage) * size
    difference = found["difference_bytes_per_token"]
    assert found["formula_bytes_per_token"] + sum(difference.values()) == pytest.approx(
        found["forward_bytes_per_token"]
    )
    assert difference["embedding"] == (7 if way == "naive" else 1) * size
    assert difference["partial_sums"] == partials * size
    stored, alive = found["stored_blocks_peak_per_rank"], found["alive_blocks_peak_per_rank"]
    assert all(0 <= less <= more for less, more in zip(stored, alive, strict=True))
    assert all(less > 0 for less in stored) if way == "cached" else stored == [0] * 2


def test_standard_residuals_cross_once_per_stage_and_store_nothing(measured):
    found = measured["traffic"]["standard"]
    assert found["forward_bytes_per_token"] == 7 * 64 * 4
    assert found["stored_blocks_peak_per_rank"] == found["alive_blocks_peak_per_rank"] == [0] * 2


def test_time_is_a_ratio_to_standard_residuals_of_the_same_round(measured):
    assert list(measured["times"]) == ["standard", "block", "full"] and measured["times"]["standard"]["overhead"] == 0
    assert all(len(found["overhead_of_rounds"]) == 1 for found in measured["times"].values())
