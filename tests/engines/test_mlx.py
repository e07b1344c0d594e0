"""mlx-lm on what is written for it: the same logits, for every feature that it computes."""

import json
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from helpers import random_attnres, random_tokens
from test_kimi_k3 import CASES, built, released_config

from attnres.conversion import convert

pytestmark = pytest.mark.engines
HERE = Path(__file__).parent
TOLERANCE = 2e-3  # largest difference of logits whose standard deviation is 2
REFUSED = {"groups of experts", "groups of one expert", "softmax router"}


def compare(mlx_python, model, tmp_path, **options):
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "k3", to="kimi-k3", engine="mlx", verify="full", **options)
    tokens = random_tokens(1, 37)[0]
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    command = [mlx_python, HERE / "mlx_logits.py", tmp_path / "k3", tmp_path / "tokens.json", tmp_path / "logits.npz"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = numpy.load(tmp_path / "logits.npz")
    with torch.no_grad():
        expected = model(tokens.unsqueeze(0)).logits[0].numpy()
    assert 1 < expected.std() < 3
    for how in ("prefill", "decode"):
        assert numpy.abs(found[how] - expected).max() < TOLERANCE, how
        assert (found[how].argmax(-1) == expected.argmax(-1)).all(), how


@pytest.mark.parametrize("feature", [feature for feature in CASES if feature not in REFUSED])
def test_every_feature_has_the_logits_of_ours(feature, mlx_python, tmp_path):
    compare(mlx_python, built(released_config(**CASES[feature]), 2), tmp_path)


def test_a_model_on_transformers_kimi_linear_has_the_logits_of_ours(mlx_python, tmp_path):
    compare(mlx_python, random_attnres("kimi_linear", layers=8, layers_per_block=3, rms_norm_eps=1e-5), tmp_path)
