"""A forward pass without autograd: the same results, and what it takes in memory and digits."""

import importlib.util
from pathlib import Path
from statistics import median

import pytest
import torch
from helpers import random_attnres, random_tokens, relative_error

from attnres.bench.memory import peak_bytes

SHAPES = {"one token": (1, 1), "few tokens": (3, 5), "a batch of one token": (7, 1), "many tokens": (2, 67)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "granite"])
def test_logits_without_autograd_are_those_with_it(family, mode, shape):
    model = random_attnres(family, mode)
    tokens = random_tokens(*shape)
    expected = model(tokens).logits
    with torch.no_grad():
        assert relative_error(model(tokens).logits, expected) < 1e-4
    with torch.inference_mode():
        assert relative_error(model(tokens).logits, expected) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_decoding_token_by_token_gives_the_logits_of_the_whole_text(mode, batch):
    model = random_attnres("qwen3", mode)
    tokens = random_tokens(batch, 11)
    expected = model(tokens).logits
    with torch.no_grad():
        cache, steps = None, []
        for position in range(tokens.shape[1]):
            output = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-4


def test_extreme_logits_neither_overflow_nor_lose_the_largest():
    model = random_attnres("llama")
    with torch.no_grad():
        for name, parameter in model.depth_mixer.named_parameters():
            if name.endswith("query"):
                parameter.mul_(1e4)
    for shape in SHAPES.values():
        tokens = random_tokens(*shape)
        expected = model(tokens).logits
        with torch.no_grad():
            found = model(tokens).logits
        assert torch.isfinite(found).all() and relative_error(found, expected) < 1e-3


def test_infinite_hidden_states_stay_visible():
    model = random_attnres("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
        for shape in SHAPES.values():
            assert torch.isnan(model(random_tokens(*shape)).logits).all()


@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_chunked_prefill_needs_room_for_the_sources_of_one_chunk_only(mode):
    """Over the same backbone with plain residuals; the cache is the same for both."""
    tokens, chunk = random_tokens(1, 1024), 128
    standard, mixed = random_attnres("llama", "standard"), random_attnres("llama", mode)

    def prefill(model, length):
        cache = None
        with torch.no_grad():
            for start in range(0, tokens.shape[1], length):
                part = tokens[:, start : start + length]
                cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def over_standard(length):
        cpu = torch.device("cpu")
        return peak_bytes(lambda: prefill(mixed, length), cpu) - peak_bytes(lambda: prefill(standard, length), cpu)

    whole, chunked = over_standard(tokens.shape[1]), over_standard(chunk)
    assert whole > 0 and chunked < whole / 4


def test_rounding_errors_in_bfloat16_stay_near_those_of_plain_residuals():
    """As benchmarks/rounding.py measures them, on smaller models; what it finds for larger ones is in the documents."""
    path = Path(__file__).parents[1] / "benchmarks" / "rounding.py"
    spec = importlib.util.spec_from_file_location("rounding", path)
    rounding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rounding)
    runs = [rounding.errors(seed, layers=12, hidden_size=128, tokens=64) for seed in range(3)]
    for name in ("block inference", "block training", "full training", "full inference"):
        ratio = median(run[name] / run[f"plain {name.split()[1]}"] for run in runs)
        assert ratio < (2.0 if name == "full inference" else 1.5), f"{name}: {ratio:.2f}"
