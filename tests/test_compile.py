"""torch.compile without graph breaks: equal logits and gradients, in inference and in training."""

import copy
import shutil

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES
from helpers import compiles, random_attnres, random_tokens, relative_error

TOLERANCE = 1e-3  # see test_generation

# Families that are not compiled for training as plain models either, and why.
NOT_COMPILED_IN_TRAINING = {
    "qwen3_next": "its chunked delta rule calls view on a tensor that is not contiguous",
    "kimi_linear": "its chunked delta rule is a Python loop, unrolled for minutes",
    "kimi_k3": "its linear attention is that of kimi_linear",
}


def cases(families, default):
    """All families; most are marked slow, because each compiles for several seconds."""
    return [pytest.param(family, marks=() if family in default else pytest.mark.slow) for family in families]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles
@torch.no_grad()
@pytest.mark.parametrize("family", cases(FAMILIES, default=("gemma2", "qwen3_moe")))
def test_inference_compiles_into_one_graph_with_equal_logits(family):
    model = random_attnres(family, layers=4)
    tokens = random_tokens(2, 9)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(tokens, use_cache=False).logits, expected) < TOLERANCE


def assert_compiled_step_is_equal(model, backend="aot_eager"):
    tokens = random_tokens(2, 9)
    model.train()
    twin = copy.deepcopy(model)
    expected = model(tokens, labels=tokens, use_cache=False)
    expected.loss.backward()
    output = torch.compile(twin, fullgraph=True, backend=backend)(tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=1e-4)
    for name, parameter in model.named_parameters():
        gradient = twin.get_parameter(name).grad
        if parameter.grad is None:  # an expert that no token chose
            assert gradient is None or not gradient.any(), name
        else:
            assert relative_error(gradient, parameter.grad) < 0.01 or parameter.grad.norm() < 1e-6, name


@compiles
@pytest.mark.parametrize(
    "family", cases([family for family in FAMILIES if family not in NOT_COMPILED_IN_TRAINING], default=("llama",))
)
def test_training_compiles_into_one_graph_with_equal_gradients(family):
    model = random_attnres(family, layers=3)
    if family in MOE_FAMILIES:
        # Grouped experts fall back to a loop over token counts on CPU, whose backward older versions cannot compile.
        model.set_experts_implementation("batched_mm")
    assert_compiled_step_is_equal(model)


@compiles
@pytest.mark.parametrize("mode", ["full", pytest.param("standard", marks=pytest.mark.slow)])
def test_training_in_the_other_modes_compiles_into_one_graph_with_equal_gradients(mode):
    assert_compiled_step_is_equal(random_attnres("qwen3", mode, layers=3))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "full", "standard"])
def test_training_with_activation_checkpointing_compiles_into_one_graph(mode):
    model = random_attnres("llama", mode, layers=3)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert_compiled_step_is_equal(model)


@compiles
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["block", "full"])
def test_generated_code_gives_equal_gradients(mode):
    assert_compiled_step_is_equal(random_attnres("qwen3", mode, layers=3), backend="inductor")


@compiles
@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_generation_with_a_compiled_forward_and_a_static_cache_is_equal(family):
    model = random_attnres(family, layers=3)
    prompt = random_tokens(2, 6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(prompt, **options), expected)


@compiles
@torch.no_grad()
@pytest.mark.slow
def test_compiled_inference_reports_hidden_states_and_depth_weights():
    model = random_attnres("llama", layers=3)
    tokens = random_tokens(2, 9)
    options = {"output_hidden_states": True, "output_depth_weights": True, "use_cache": False}
    expected = model(tokens, **options)
    output = torch.compile(model, fullgraph=True, backend="eager")(tokens, **options)
    for field in ("hidden_states", "depth_weights"):
        assert len(output[field]) == len(expected[field])
        for value, wanted in zip(output[field], expected[field], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)


@compiles
@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_decoder_layers_can_be_compiled_one_by_one(how):
    model, tokens = random_attnres("llama", layers=3), random_tokens(2, 9)
    expected = model(tokens).logits
    for layer_idx, layer in enumerate(model.model.layers):
        if how == "wrapped":
            model.model.layers[layer_idx] = torch.compile(layer, fullgraph=True, backend="eager")
        else:
            layer.compile(fullgraph=True, backend="eager")
    assert relative_error(model(tokens).logits, expected) < TOLERANCE
