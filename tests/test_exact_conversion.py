"""A conversion computes what the plain model computes: with the families' real epsilons, weights of every size."""

import copy

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES
from helpers import random_tokens, relative_error, short_config
from transformers import AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM

# Of the initialisation; the last makes logits of several tens.
SIZES = {"tiny": 0.002, "usual": 0.02, "large": 0.2}
# The linear attention of qwen3_next multiplies rounding: a plain model whose residual stream is summed in another order
# is as far from itself. In full mode the order is the same, and so are all bits.
SINGLE = {"qwen3_next": 1e-5}


def plain_model(family, size, seed=0):
    torch.manual_seed(seed)
    config = short_config(family, 5, initializer_range=size)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def error_of(family, logits, expected):
    """Returns the relative error, or with experts the median over tokens.

    A router may choose either of two experts whose scores differ by no more than rounding.
    """
    if family not in MOE_FAMILIES:
        return relative_error(logits, expected)
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors.flatten().median().item()


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_is_exact_in_single_and_double_precision(family, seed, size):
    tokens = random_tokens(2, 9)
    single = plain_model(family, SIZES[size], seed)
    expected = single(tokens).logits
    double = copy.deepcopy(single).double()
    if any(hasattr(module, "num_experts") for module in double.modules()):
        double.set_experts_implementation("eager")
    expected_in_double = double(tokens).logits
    for mode in ("block", "full"):
        model = AttnResForCausalLM.from_backbone(single, residual_mode=mode, layers_per_block=2)
        for implementation in ("auto", "eager"):
            model.set_depth_implementation(implementation)
            error = error_of(family, model(tokens).logits, expected)
            assert error < (2e-6 if mode == "full" else SINGLE.get(family, 2e-6)), (mode, implementation)
        model = AttnResForCausalLM.from_backbone(double, residual_mode=mode, layers_per_block=2)
        assert error_of(family, model(tokens).logits, expected_in_double) < 1e-10, mode


@torch.no_grad()
@pytest.mark.parametrize("mode", ["block", "full"])
def test_without_the_option_small_weights_show_the_epsilon(mode):
    tokens, plain = random_tokens(2, 9), plain_model("llama", 0.02)
    model = AttnResForCausalLM.from_backbone(plain, residual_mode=mode, scale_norm_eps=False)
    assert relative_error(model(tokens).logits, plain(tokens).logits) > 1e-3


def test_the_option_is_on_for_what_is_converted_and_off_where_a_file_says_nothing(tmp_path):
    plain = plain_model("llama", 0.02)
    plain.save_pretrained(tmp_path / "plain")
    assert AttnResForCausalLM.from_backbone(plain).config.scale_norm_eps
    model = AttnResForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.config.scale_norm_eps
    model.save_pretrained(tmp_path / "attnres")
    assert AttnResConfig.from_pretrained(tmp_path / "attnres").scale_norm_eps
    path = tmp_path / "attnres" / "config.json"
    path.write_text(path.read_text().replace('"scale_norm_eps": true,', ""))
    assert not AttnResConfig.from_pretrained(tmp_path / "attnres").scale_norm_eps
    assert not AttnResConfig(backbone_config=plain.config).scale_norm_eps
    with pytest.raises(ValueError, match="scale_norm_eps must be true or false, got 'yes'"):
        AttnResConfig(backbone_config=plain.config, scale_norm_eps="yes")
