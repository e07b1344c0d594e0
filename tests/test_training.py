"""Training: gradients with activation checkpointing, in lower precision, with a frozen backbone, at the zero start."""

import copy

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES
from helpers import random_attnres, random_tokens, relative_error, short_config
from torch import nn

from attnres import AttnResConfig, AttnResForCausalLM

MODES = ("block", "full", "standard")


def checkpointed(model, use_reentrant):
    """Returns a copy that recomputes its decoder layers in the backward pass."""
    model = copy.deepcopy(model)
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name, of transformers 5.20 or so
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    return model


def gradients(model, tokens, **inputs):
    """Returns the loss and gradients of one training step, without parameters that have no gradient."""
    model.train()
    model.zero_grad()
    output = model(tokens, labels=tokens, use_cache=False, **inputs)
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.loss.detach(), found


def assert_equal_gradients(values, expected):
    assert values.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-6).item()
        torch.testing.assert_close(
            values[name], gradient, rtol=1e-3, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


CHECKPOINTING_CASES = [(family, "block", False) for family in FAMILIES] + [
    (family, mode, reentrant)
    for family in ("llama", "qwen3_moe")
    for mode, reentrant in (("block", True), ("full", False), ("full", True), ("standard", False), ("standard", True))
]


@pytest.mark.parametrize(("family", "mode", "use_reentrant"), CHECKPOINTING_CASES)
def test_activation_checkpointing_changes_no_gradient(family, mode, use_reentrant):
    model = random_attnres(family, mode)
    tokens = random_tokens(2, 9)
    expected_loss, expected = gradients(model, tokens)
    if mode != "standard":
        depth = {name for name, _ in model.named_parameters() if "depth_mixer." in name}
        assert len(depth) == 6
        assert all(expected[name].abs().max() > 1e-7 for name in depth)
    loss, found = gradients(checkpointed(model, use_reentrant), tokens)
    torch.testing.assert_close(loss, expected_loss)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_runs_every_decoder_layer_twice(mode):
    """Otherwise the test above would compare nothing."""
    model = checkpointed(random_attnres("llama", mode), use_reentrant=False)
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    gradients(model, random_tokens(1, 5))
    assert calls == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_activation_checkpointing_with_a_frozen_backbone_trains_the_depth_mixer(mode, use_reentrant):
    model = random_attnres("qwen3", mode).freeze_backbone()
    tokens = random_tokens(2, 9)
    _, expected = gradients(model, tokens)
    assert len(expected) == 6
    _, found = gradients(checkpointed(model, use_reentrant), tokens)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_with_inputs_that_require_gradients_changes_no_gradient(mode, use_reentrant):
    """Adapters need this: all but a few weights are frozen, and gradients flow through the embeddings."""
    model = random_attnres("llama", mode)
    model.requires_grad_(False)
    trainable = "model.layers.1.self_attn.q_proj.weight"
    model.get_parameter(trainable).requires_grad_(True)
    tokens = random_tokens(2, 9)
    _, expected = gradients(model, tokens)
    assert expected.keys() == {trainable}
    twin = checkpointed(model, use_reentrant)
    twin.enable_input_require_grads()
    _, found = gradients(twin, tokens)
    assert_equal_gradients(found, expected)


def test_activation_checkpointing_keeps_the_gradient_of_the_load_balancing_loss():
    model = random_attnres("qwen3_moe", router_aux_loss_coef=5.0)
    tokens = random_tokens(2, 9)
    _, without = gradients(model, tokens)
    _, expected = gradients(model, tokens, output_router_logits=True)
    router = "model.layers.1.mlp.gate.weight"
    assert relative_error(without[router], expected[router]) > 0.1
    _, found = gradients(checkpointed(model, use_reentrant=False), tokens, output_router_logits=True)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_outputs_are_captured_once_with_activation_checkpointing(mode):
    model = random_attnres("llama", mode)
    tokens = random_tokens(1, 5)
    expected = model(tokens, use_cache=False, output_hidden_states=True, output_depth_weights=True)
    twin = checkpointed(model, use_reentrant=False).train()
    output = twin(tokens, use_cache=False, output_hidden_states=True, output_depth_weights=True)
    output.logits.sum().backward()
    for field in ("hidden_states", "depth_weights"):
        assert len(output[field]) == len(expected[field])
        for value, wanted in zip(output[field], expected[field], strict=True):
            torch.testing.assert_close(value, wanted)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close_to_single_precision(family, precision):
    """The bound is tight only without experts, which may be chosen differently, and without linear attention."""
    model = random_attnres(family, layers=4, initializer_range=0.12)
    # Grouped experts want strides of 16 bytes in this precision, which the tiny sizes do not have.
    model.set_experts_implementation("eager")
    tokens = random_tokens(2, 9)
    expected_logits = model(tokens).logits
    _, expected = gradients(model, tokens)
    if precision == "bfloat16":
        low = copy.deepcopy(model).to(torch.bfloat16)
        output = low(tokens, output_depth_weights=True)
        assert output.logits.dtype == torch.bfloat16
        assert {weights.dtype for weights in output.depth_weights} == {torch.float32}
        _, found = gradients(low, tokens)
        assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16}
    else:
        low = model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = low(tokens, output_hidden_states=True, output_depth_weights=True)
            _, found = gradients(low, tokens)
        assert {state.dtype for state in output.hidden_states[:-1]} == {
            torch.float32
        }  # mixtures stay in that of the embedding
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for weights in output.depth_weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    assert relative_error(output.logits.float(), expected_logits) < (0.5 if family in MOE_FAMILIES else 0.05)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        if "depth_mixer." in name and family not in MOE_FAMILIES:
            similarity = nn.functional.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), dim=0)
            assert similarity > 0.9, name


# ------------------------------------------------------------------------------------------------------ the zero start


def fresh(mode, family="llama"):
    torch.manual_seed(0)
    config = AttnResConfig(backbone_config=short_config(family), residual_mode=mode, layers_per_block=2)
    return AttnResForCausalLM(config)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_with_zero_queries_gains_get_exactly_no_gradient_and_queries_get_one(mode):
    model = fresh(mode)
    _, found = gradients(model, random_tokens(2, 9))
    for part in ("attention_norm", "mlp_norm", "output_norm"):
        query = found[f"model.depth_mixer.{part}.query"]
        # The first attention sees one source: nothing to weigh.
        reading = query[1:] if part == "attention_norm" else query
        assert (reading.flatten(0, -2).norm(dim=-1) > 0).all(), part
        assert not found[f"model.depth_mixer.{part}.weight"].any(), part
    assert not found["model.depth_mixer.attention_norm.query"][0].any()
    assert found["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("mode", ["block", "full"])
def test_gains_get_a_gradient_once_queries_have_moved(mode):
    model = fresh(mode)
    optimizer = torch.optim.SGD(model.depth_parameters(), lr=0.1)
    tokens = random_tokens(2, 9)
    gradients(model, tokens)
    optimizer.step()
    _, found = gradients(model, tokens)
    for part in ("attention_norm", "mlp_norm", "output_norm"):
        assert found[f"model.depth_mixer.{part}.weight"].any(), part


@pytest.mark.parametrize("mode", MODES)
def test_a_few_steps_lower_the_loss(mode):
    model = fresh(mode, "qwen3").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = random_tokens(4, 12)
    losses = []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_frozen_backbone_leaves_six_trainable_parameters():
    model = random_attnres("qwen3_moe").freeze_backbone()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"model.depth_mixer.{part}.{name}"
        for part in ("attention_norm", "mlp_norm", "output_norm")
        for name in ("query", "weight")
    }
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model, random_tokens(2, 9))
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trainable


@pytest.mark.parametrize("mode", MODES)
def test_depth_and_backbone_parameters_are_all_parameters_once(mode):
    model = random_attnres("gemma2", mode)
    depth, backbone = list(model.depth_parameters()), list(model.backbone_parameters())
    assert len(depth) == (0 if mode == "standard" else 6)
    assert {id(p) for p in depth}.isdisjoint(id(p) for p in backbone)
    assert {id(p) for p in [*depth, *backbone]} == {id(p) for p in model.parameters()}


# --------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "ernie4_5_moe"])
def test_embeddings_and_head_are_tied_as_configured_and_stay_so(tmp_path, family, tie):
    model = random_attnres(family, tie_word_embeddings=tie)
    assert model.config.tie_word_embeddings is tie
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie
    tokens = random_tokens(1, 5)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tie
    torch.testing.assert_close(loaded(tokens).logits, expected)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [90, 120])
def test_resized_embeddings_keep_known_tokens_and_the_configuration_follows(tmp_path, tie, size):
    model = random_attnres("qwen3", tie_word_embeddings=tie)
    tokens = random_tokens(2, 5, vocab_size=90)
    expected = model(tokens).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.config.backbone_config.vocab_size == size
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie
    output = model(tokens, labels=tokens)  # the loss reads the vocabulary size
    assert output.logits.shape == (2, 5, size)
    torch.testing.assert_close(output.logits[..., :90], expected[..., :90])
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(loaded(tokens).logits, output.logits)


def test_resized_embeddings_of_a_head_with_a_bias_compute():
    model = random_attnres("ernie4_5_moe")
    tokens = random_tokens(2, 5)
    expected = model(tokens).logits
    model.resize_token_embeddings(120, mean_resizing=False)
    torch.testing.assert_close(model(tokens).logits[..., :97], expected)
