"""The models against the oracle: logits and every gradient, all families, all modes."""

import copy

import pytest
import torch
from families import FAMILIES
from helpers import short_config
from reference import Oracle
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM

MODES = {
    "block1": ({"layers_per_block": 1, "scale_norm_eps": False}, 2),
    "block3": ({"layers_per_block": 3, "scale_norm_eps": False}, 6),
    "block5": ({"layers_per_block": 5, "scale_norm_eps": False}, 10),
    "full": ({"residual_mode": "full", "scale_norm_eps": False}, None),
    "block3 scaled": ({"layers_per_block": 3}, 6),
    "full scaled": ({"residual_mode": "full"}, None),
}
# Relative, in float64; the families' own norms round to float32 on the way, in the model and in the oracle alike. Where
# the two meet a rounding from different sides, that number differs by 6e-8, and what it makes of it is the model's.
TOLERANCE = 1e-5
LAYERS = 6


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def plain_model(family):
    """Builds a float64 model with embeddings of size 1 and an implementation of experts for float64."""
    config = short_config(family, LAYERS, initializer_range=0.1)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    if any(hasattr(module, "num_experts") for module in plain.modules()):
        plain.set_experts_implementation("eager")
    with torch.no_grad():
        plain.model.embed_tokens.weight.normal_()
        for name, parameter in plain.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-2, -1)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-1, 1)
    return plain


def random_depth_parameters(model, scale=1.5):
    """Draws pseudo-queries and gains, so that depth weights are far from uniform and a wiring fault shows."""
    with torch.no_grad():
        for name, parameter in model.depth_mixer.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * scale / noise.shape[-1] ** 0.5 if name.endswith("query") else 1 + 0.3 * noise)


def oracle_of(plain, model, sublayers_per_block):
    """Runs the oracle over `plain` with leaf copies of the model's depth parameters, [2 * layers + 1, D] each."""
    mixer = model.depth_mixer

    def ordered(name):
        attention, mlp, output = (
            getattr(part, name).detach().reshape(-1, model.config.hidden_size)
            for part in (mixer.attention_norm, mixer.mlp_norm, mixer.output_norm)
        )
        return torch.cat([torch.stack([attention, mlp], 1).flatten(0, 1), output]).requires_grad_(True)

    scaled = model.config.scale_norm_eps
    return Oracle(plain, ordered("query"), ordered("weight"), sublayers_per_block, scaled)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_all_gradients_equal_the_stacking_oracle(family, mode):
    options, sublayers_per_block = MODES[mode]
    plain = plain_model(family)
    model = AttnResForCausalLM.from_backbone(plain, **options)
    random_depth_parameters(model)
    oracle = oracle_of(plain, model, sublayers_per_block)
    input_ids = torch.randint(3, 97, (2, 7))

    expected = oracle(input_ids)
    output = model(input_ids, output_depth_weights=True)
    assert relative_error(output.logits, expected.logits) < TOLERANCE
    assert len(output.depth_weights) == len(oracle.weights) == 2 * LAYERS + 1
    for weights, expected_weights in zip(output.depth_weights, oracle.weights, strict=True):
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)

    direction = torch.randn_like(expected.logits)
    (expected.logits * direction).sum().backward()
    (output.logits * direction).sum().backward()
    expected_gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, gradient in {"query": oracle.queries.grad, "weight": oracle.gains.grad}.items():
        expected_gradients[f"model.depth_mixer.attention_norm.{name}"] = gradient[0:-1:2]
        expected_gradients[f"model.depth_mixer.mlp_norm.{name}"] = gradient[1:-1:2]
        expected_gradients[f"model.depth_mixer.output_norm.{name}"] = gradient[-1]
    errors = {}
    for name, parameter in model.named_parameters():
        wanted = expected_gradients.pop(name)
        if wanted is None:  # an expert that no token chose
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        errors[name] = relative_error(parameter.grad.reshape(wanted.shape), wanted) if wanted.any() else 0.0
    assert not expected_gradients, f"not compared: {sorted(expected_gradients)}"
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_mode_is_the_plain_backbone_to_the_bit(family):
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_config(short_config(family)).eval()
    model = AttnResForCausalLM.from_backbone(plain, residual_mode="standard")
    input_ids = torch.randint(3, 97, (2, 13))
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, plain(input_ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation_gives_the_backbone_the_weights_of_its_family_and_the_mixer_zeros_and_ones(family):
    config = short_config(family)
    torch.manual_seed(7)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    torch.manual_seed(7)
    model = AttnResForCausalLM(AttnResForCausalLM.config_class.from_backbone(config))
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state.pop(name), tensor, rtol=0, atol=0, msg=name)
    assert len(state) == 6
    for name, tensor in state.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("query") else torch.ones_like(tensor))
