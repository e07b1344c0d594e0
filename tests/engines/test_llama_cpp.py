"""llama.cpp on what is written for it: the same logits, for every feature that it computes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from helpers import random_attnres, random_tokens
from test_kimi_k3 import CASES, built, released_config

from attnres.conversion import convert

pytestmark = pytest.mark.engines
HERE = Path(__file__).parent
# Largest difference of logits whose standard deviation is 2. Ours norm queries, keys and what is compressed with 1e-6
# whatever rms_norm_eps is, so that is what the models of these tests have.
TOLERANCE = 1e-3
TOLERANCE_OF_EPSILON = 5e-3  # with rms_norm_eps 1e-5
REFUSED = {"every other layer sparse", "groups of experts", "groups of one expert", "softmax router"}


def options_of(feature, **options):
    options = {**CASES[feature], "rms_norm_eps": 1e-6, **options}
    # It has one number of heads.
    return {**options, "linear_attn_config": {**options.get("linear_attn_config", {}), "num_heads": 3}}


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def logits_of(llama_cpp, folder, tokens):
    """By llama.cpp, from a folder in Kimi K3's layout: `prefill`, `decode` and, rounded to float16, `flash`."""
    gguf, prompt, result = (folder.parent / f"{folder.name}{suffix}" for suffix in (".gguf", ".json", ".npz"))
    run(sys.executable, HERE / "gguf_without_vocabulary.py", llama_cpp.source, folder, gguf)
    prompt.write_text(json.dumps(tokens.tolist()))
    run(llama_cpp.python, HERE / "llama_cpp_logits.py", gguf, prompt, result)
    return numpy.load(result)


def compare(llama_cpp, model, tmp_path, tolerance, **options):
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "k3", to="kimi-k3", engine="llama.cpp", verify="full", **options)
    tokens = random_tokens(1, 37)[0]
    with torch.no_grad():
        expected = model(tokens.unsqueeze(0)).logits[0].numpy()
    found = logits_of(llama_cpp, tmp_path / "k3", tokens)
    assert 1 < expected.std() < 3
    for how in ("prefill", "decode"):
        assert numpy.abs(found[how] - expected).max() < tolerance, how
        assert (found[how].argmax(-1) == expected.argmax(-1)).all(), how


@pytest.mark.parametrize("feature", [feature for feature in CASES if feature not in REFUSED])
def test_every_feature_has_the_logits_of_ours(feature, llama_cpp, tmp_path):
    compare(llama_cpp, built(released_config(**options_of(feature)), 2), tmp_path, TOLERANCE)


def test_another_epsilon_is_off_by_what_is_stated(llama_cpp, tmp_path):
    options = options_of("everything", rms_norm_eps=1e-5)
    compare(llama_cpp, built(released_config(**options), 2), tmp_path, TOLERANCE_OF_EPSILON)


def test_a_model_on_transformers_kimi_linear_has_the_logits_of_ours(llama_cpp, tmp_path):
    model = random_attnres("kimi_linear", layers=8, layers_per_block=3, rms_norm_eps=1e-6)
    compare(llama_cpp, model, tmp_path, TOLERANCE)


def test_packed_experts_stay_packed_for_it(llama_cpp, tmp_path):
    from conversion.test_kimi_k3_layout import MXFP4, as_released, pack, write_release

    options = options_of("everything", routed_expert_hidden_size=32, moe_intermediate_size=64)
    packed, unpacked = pack(as_released(built(released_config(**options), 2)))
    text = {**released_config(**options), "attn_res_block_size": 2, "quantization_config": MXFP4}
    folder = write_release(tmp_path / "released", packed, text)
    convert(folder, tmp_path / "k3", to="kimi-k3", engine="llama.cpp", keep_packed=True)
    gguf = tmp_path / "k3.gguf"
    run(sys.executable, HERE / "gguf_without_vocabulary.py", llama_cpp.source, tmp_path / "k3", gguf)
    sys.path.insert(0, f"{llama_cpp.source}/gguf-py")
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for layer in range(1, 5):
        for theirs, ours in {"gate": "w1", "up": "w3", "down": "w2"}.items():
            tensor = tensors[f"blk.{layer}.ffn_{theirs}_exps.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            for expert, weight in enumerate(dequantize(tensor.data, tensor.tensor_type)):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"
                assert torch.equal(torch.from_numpy(weight), unpacked[name].float()), name
    # Its products of packed weights round the other factor to 8 bits: that it runs, not how close it is.
    assert numpy.isfinite(logits_of(llama_cpp, tmp_path / "k3", random_tokens(1, 37)[0])["prefill"]).all()
