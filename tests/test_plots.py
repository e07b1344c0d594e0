"""Tests the figures with made-up arrays: their sizes, margins and colours, and that pyplot is not used."""

import sys

import matplotlib.image
import numpy as np
import pytest

from attnres import plots

CURVES = {
    "plain": {
        "train_steps": [1, 2, 3, 4],
        "train_loss": [5, 4, 3, 2],
        "held_out_steps": [0, 2, 4],
        "held_out_loss": [6, 5, 4],
    },
    "other": {"train_steps": [3, 4], "train_loss": [3.1, 2.2], "held_out_steps": [2, 4], "held_out_loss": [5, 3.5]},
}


def test_loss_curves_have_the_promised_size_and_one_colour_per_variant(tmp_path):
    plots.loss_curves(tmp_path / "curves.png", CURVES, baseline="plain")
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[:2] == (750, 1800)
    for colour in plots.COLOURS[:2]:
        target = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        assert (np.abs(image[..., :3] - target).max(-1) < 0.02).sum() > 100


def test_pyplot_is_not_imported():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_forest_shows_rows_with_and_without_a_published_difference(tmp_path):
    path = tmp_path / "forest.png"
    plots.forest(path, ["a", "b"], [1.0, -2.0], [(0, 2), (-5, 1)], [0.5, None], ["1", "2"], "n", "t", "a warning")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def run_over_depth(name):
    depth = {"output_rms": [1.0, None, 3.0], "gradient_norm": [0.5, 0.2, 0.1]}
    return {"name": name, "step": 7, **depth, "validation": {"steps": [], "loss": []}}


@pytest.mark.parametrize("count", [1, 8])
def test_training_dynamics_grow_with_their_legend_and_nothing_is_cut_off(tmp_path, count):
    plots.training_dynamics(tmp_path / "dynamics.png", [run_over_depth(f"_run {n} of $5") for n in range(count)])
    image = matplotlib.image.imread(tmp_path / "dynamics.png")[..., :3]
    assert image.shape[1] == 2100 and image.shape[0] == 720 + 30 * -(-count // 3)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 1).all()
