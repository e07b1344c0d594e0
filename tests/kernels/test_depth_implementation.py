"""`depth_implementation`: the kernels in a model, how they are chosen, and what happens where they do not work."""

import copy
import sys
import warnings

import pytest
import torch
from helpers import compiles, random_attnres, random_tokens, relative_error

from attnres import depth_mixer

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _fresh_warnings():
    depth_mixer._warn_once.cache_clear()


def twins(mode="block", **options):
    eager = random_attnres("qwen3_moe", mode, **options)
    triton = copy.deepcopy(eager)
    triton.set_depth_implementation("triton")
    return eager, triton


@pytest.mark.parametrize("mode", ["block", "full"])
def test_logits_weights_and_gradients_are_those_of_eager(mode):
    eager, triton = twins(mode)
    tokens = random_tokens(2, 5)
    outputs = [model(tokens, labels=tokens, output_depth_weights=True) for model in (eager, triton)]
    assert relative_error(outputs[1].logits, outputs[0].logits) < 1e-5
    for found, expected in zip(outputs[1].depth_weights, outputs[0].depth_weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for (name, expected), found in zip(eager.named_parameters(), triton.parameters(), strict=True):
        if expected.grad is not None:
            assert relative_error(found.grad, expected.grad) < 1e-4, name
    with torch.no_grad():
        assert relative_error(triton(tokens).logits, outputs[0].logits) < 1e-5


def test_activation_checkpointing_recomputes_the_same_gradients():
    _, triton = twins()
    tokens = random_tokens(1, 5)
    checkpointed = copy.deepcopy(triton).train()
    enable = (
        getattr(checkpointed, "activation_checkpointing_enable", None) or checkpointed.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    for model in (triton, checkpointed):
        model(tokens, labels=tokens).loss.backward()
    for (name, expected), found in zip(triton.named_parameters(), checkpointed.parameters(), strict=True):
        if expected.grad is not None:
            assert relative_error(found.grad, expected.grad) < 1e-5, name


@compiles
def test_a_compiler_sees_one_graph():
    model = random_attnres("llama")
    model.set_depth_implementation("triton")
    tokens = random_tokens(1, 5)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(tokens, use_cache=False).logits, expected) < 1e-5


def test_a_device_without_kernels_mixes_by_eager_after_one_warning(monkeypatch):
    from attnres.kernels import mix_triton

    eager, triton = twins()
    monkeypatch.setattr(mix_triton, "INTERPRETED", False)
    tokens = random_tokens(1, 5)
    with pytest.warns(UserWarning, match="run on cuda and xpu, not on cpu") as caught:
        found = triton(tokens).logits
        triton(tokens)
    assert len(caught) == 1
    assert relative_error(found, eager(tokens).logits) < 1e-5


def test_kernels_that_fail_their_self_check_are_not_used(monkeypatch):
    from attnres.kernels import mix_triton

    eager, triton = twins()
    monkeypatch.setattr(mix_triton, "self_check", lambda device: "mixture is off by 3.0e-01")
    with pytest.warns(UserWarning, match='mixes by "eager" instead: mixture is off'):
        found = triton(random_tokens(1, 5)).logits
    assert relative_error(found, eager(random_tokens(1, 5)).logits) < 1e-5


def test_without_triton_the_warning_names_the_extra(monkeypatch):
    _, triton = twins()
    monkeypatch.setitem(sys.modules, "attnres.kernels.mix_triton", None)
    with pytest.warns(UserWarning, match=r"pip install attnres\[triton\]"):
        triton(random_tokens(1, 5))


def test_automatic_choice_is_eager_on_the_cpu_and_says_nothing(monkeypatch):
    model = random_attnres("llama")
    assert model.config.depth_implementation == "auto"
    monkeypatch.setattr(depth_mixer, "mix_triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(random_tokens(1, 5))


def test_double_precision_mixes_by_eager():
    eager = random_attnres("llama").double()
    triton = copy.deepcopy(eager)
    triton.set_depth_implementation("triton")
    tokens = random_tokens(1, 5)
    torch.testing.assert_close(triton(tokens).logits, eager(tokens).logits, rtol=0, atol=0)
