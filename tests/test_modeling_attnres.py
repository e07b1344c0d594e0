"""The models against the oracle: logits and every gradient, all families, all modes."""

import copy

import pytest
import torch
from families import FAMILIES, tiny_config
from reference import Oracle
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM

MODES = {
    "block1": ({"layers_per_block": 1}, 2),
    "block3": ({"layers_per_block": 3}, 6),
    "block5": ({"layers_per_block": 5}, 10),
    "full": ({"residual_mode": "full"}, None),
}
TOLERANCE = 1e-4  # float32, relative


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def well_conditioned_model(family):
    """A plain model whose float32 gradients are good to 1e-4: no vanishing norms, no decay that forgets everything."""
    plain = AutoModelForCausalLM.from_config(tiny_config(family, initializer_range=0.1, rms_norm_eps=1e-5)).eval()
    with torch.no_grad():
        plain.model.embed_tokens.weight.normal_()
        for name, parameter in plain.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-2, -1)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-1, 1)
    return plain


def random_depth_parameters(model, scale=1.5):
    """Non-zero pseudo-queries and gains: depth weights far from uniform, so that a wrong wire shows."""
    with torch.no_grad():
        for name, parameter in model.depth_mixer.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * scale / noise.shape[-1] ** 0.5 if name.endswith("query") else 1 + 0.3 * noise)


def oracle_of(plain, model, sublayers_per_block):
    """The oracle over `plain` with leaf copies of the model's depth parameters, [2 * layers + 1, D] each."""
    mixer = model.depth_mixer

    def ordered(name):
        attention, mlp, output = (
            getattr(part, name).detach().reshape(-1, model.config.hidden_size)
            for part in (mixer.attention_norm, mixer.mlp_norm, mixer.output_norm)
        )
        return torch.cat([torch.stack([attention, mlp], 1).flatten(0, 1), output]).requires_grad_(True)

    return Oracle(plain, ordered("query"), ordered("weight"), sublayers_per_block)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_all_gradients_equal_the_stacking_oracle(family, mode):
    options, sublayers_per_block = MODES[mode]
    torch.manual_seed(13)  # with some the gradient of a router nearly cancels, in both
    plain = well_conditioned_model(family)
    model = AttnResForCausalLM.from_backbone(plain, **options)
    random_depth_parameters(model)
    oracle = oracle_of(plain, model, sublayers_per_block)
    input_ids = torch.randint(3, 97, (2, 13))

    expected = oracle(input_ids)
    output = model(input_ids, output_depth_weights=True)
    assert relative_error(output.logits, expected.logits) < TOLERANCE
    assert len(output.depth_weights) == len(oracle.weights) == 25
    for weights, expected_weights in zip(output.depth_weights, oracle.weights, strict=True):
        torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)

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
    # Their linear attention multiplies rounding errors: over eight seeds up to 5e-4, by whatever code is mixed.
    assert errors[worst] < (5e-4 if family in ("qwen3_next", "kimi_k3") else TOLERANCE), f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("options", [{"layers_per_block": 5}, {"residual_mode": "full"}], ids=["block5", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_pseudo_queries_compute_what_the_plain_backbone_computes(family, options):
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    model = AttnResForCausalLM.from_backbone(plain, **options)
    input_ids = torch.randint(3, 97, (2, 13))
    with torch.no_grad():
        assert relative_error(model(input_ids).logits, plain(input_ids).logits) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_mode_is_the_plain_backbone_to_the_bit(family):
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    model = AttnResForCausalLM.from_backbone(plain, residual_mode="standard")
    input_ids = torch.randint(3, 97, (2, 13))
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, plain(input_ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation_gives_the_backbone_the_weights_of_its_family_and_the_mixer_zeros_and_ones(family):
    config = tiny_config(family)
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
