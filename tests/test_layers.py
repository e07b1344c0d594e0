"""Decoder layers that users wrap, replace or remove: the remaining layers compute the result, or one clear error."""

import copy

import pytest
import torch
from helpers import random_attnres, random_tokens, relative_error
from torch import nn

from attnres import AttnResConfig, AttnResForCausalLM

MODES = ["block", "full", "standard"]


class Wrapper(nn.Module):
    """A module that an adapter or a profiler puts around a decoder layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **options):
        return self.inner(*arguments, **options)


def cut(model, layers):
    """Builds a smaller model from the weights of the first layers, independently of the tested code."""
    config = copy.deepcopy(model.config)
    config.backbone_config.num_hidden_layers = layers
    if getattr(config.backbone_config, "layer_types", None):
        config.backbone_config.layer_types = config.backbone_config.layer_types[:layers]
    config.layers_per_block = min(config.layers_per_block, layers)
    smaller = AttnResForCausalLM(config).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if name in smaller.state_dict():
            stacked = "depth_mixer." in name and "output_norm" not in name
            state[name] = tensor[:layers] if stacked else tensor
    smaller.load_state_dict(state)
    return smaller


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_wrapped_layers_compute_and_generate_the_same(mode):
    model, tokens = random_attnres("llama", mode), random_tokens(2, 7)
    expected, generated = model(tokens).logits, model.generate(tokens, max_new_tokens=5, do_sample=False)
    for index in (1, 4):
        model.model.layers[index] = Wrapper(model.model.layers[index])
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), generated)


@torch.no_grad()
@pytest.mark.parametrize("how", ["layers", "num_hidden_layers", "both"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_is_cut_is_the_model_of_its_first_layers(mode, layers, how):
    model, tokens = random_attnres("qwen3", mode), random_tokens(2, 7)
    expected = cut(model, layers)(tokens).logits
    if how != "num_hidden_layers":
        model.model.layers = model.model.layers[:layers]
    if how != "layers":
        model.config.num_hidden_layers = layers
    assert relative_error(model(tokens).logits, expected) < 1e-6


@torch.no_grad()
def test_layers_before_a_dropped_one_keep_their_pseudo_queries_and_wrapped_ones_after_it_too():
    tokens = random_tokens(2, 7)
    models = [random_attnres("llama", layers_per_block=2) for _ in range(2)]
    for model in models:
        del model.model.layers[2]
        model.config.num_hidden_layers = 4
    models[1].model.layers[3] = Wrapper(models[1].model.layers[3])
    first, second = (model(tokens, use_cache=False, output_depth_weights=True) for model in models)
    assert torch.equal(first.logits, second.logits)
    assert [each.shape[-1] for each in first.depth_weights] == [1, 2, 2, 2, 2, 3, 3, 4, 4]


@torch.no_grad()
def test_with_zero_pseudo_queries_dropped_layers_are_those_of_the_plain_model():
    from helpers import short_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config("llama", 6)).eval()
    model = AttnResForCausalLM.from_backbone(plain, layers_per_block=2)
    for each in (plain, model):
        del each.model.layers[1:3]
        each.config.num_hidden_layers = 4
    tokens = random_tokens(2, 7)
    assert relative_error(model(tokens, use_cache=False).logits, plain(tokens, use_cache=False).logits) < 2e-6


def test_what_is_no_decoder_layer_of_ours_is_one_clear_error():
    class Skip(nn.Module):
        def forward(self, hidden_states, *_, **__):
            return hidden_states

    for mode in ("block", "full"):
        model = random_attnres("llama", mode)
        model.model.layers[2] = Skip()
        with pytest.raises(TypeError, match=r"layers\.2 must return .* only an AttnResDecoderLayer"):
            model(random_tokens(1, 5), use_cache=False)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_cut_model_is_saved_and_loaded_and_an_undecided_one_is_refused(mode, tmp_path):
    model, tokens = random_attnres("mixtral", mode), random_tokens(2, 7)
    model.model.layers = model.model.layers[:3]
    with pytest.raises(ValueError, match="num_hidden_layers=5, but the model has the decoder layers"):
        model.save_pretrained(tmp_path / "undecided")
    assert not (tmp_path / "undecided").exists()
    model.config.num_hidden_layers = 3
    model.save_pretrained(tmp_path / "cut")
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "cut")
    assert len(loaded.depth_mixer.mlp_norm.weight) == 3
    assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-4  # attention is sdpa in one of them


@pytest.mark.parametrize("exit_layer", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_drafts_of_an_early_exit_do_not_change_greedy_tokens(mode, exit_layer):
    model, tokens = random_attnres("llama", mode), random_tokens(1, 6)
    expected = model.generate(tokens, max_new_tokens=9, do_sample=False)
    drafted = model.generate(tokens, max_new_tokens=9, do_sample=False, assistant_early_exit=exit_layer)
    assert torch.equal(drafted, expected) and model.config.num_hidden_layers == 5


def test_the_checkpointing_function_of_a_layer_can_be_set_and_deleted_as_in_any_model():
    layer = random_attnres("llama").model.layers[0]
    layer._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    del layer._gradient_checkpointing_func
    assert not hasattr(layer, "_gradient_checkpointing_func")


@pytest.mark.parametrize("mode", ["block", "full", "standard"])
def test_the_checkpointing_function_of_a_layer_can_be_wrapped(mode):
    """transformers' model tests do this: the function that is set calls the one that was read before."""
    tokens, gradients, calls = random_tokens(2, 7), [], []
    for wrapped in (False, True):
        model = random_attnres("llama", mode).train()
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23 renamed it
        (enable or model.gradient_checkpointing_enable)()
        if wrapped:
            layer = model.model.layers[1]
            checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *arguments, checkpoint=checkpoint: (
                calls.append(len(arguments)) or checkpoint(*arguments)
            )
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(calls) == 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, of its own decompositions
def test_gradients_of_single_samples_and_directional_derivatives_are_those_of_autograd(mode, implementation):
    model, tokens = random_attnres("llama", mode), random_tokens(2, 7)
    model.set_depth_implementation(implementation)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, ids):
        inputs = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (), inputs).loss

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for index, ids in enumerate(tokens):
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert relative_error(per_sample[name][index], parameter.grad) < 1e-3 or parameter.grad.norm() < 1e-6, name
    along = torch.func.jvp(lambda given: loss(given, tokens[1]), (parameters,), (parameters,))[1]
    expected = sum((parameter.grad * parameter).sum() for parameter in model.parameters())
    torch.testing.assert_close(along, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"residual_mode": "full"}, {"scale_norm_eps": True, "depth_variant": "static"}]
)
def test_a_configuration_equals_itself_after_a_round_trip(options, tmp_path):
    from families import FAMILIES, tiny_config

    for family in FAMILIES:
        config = AttnResConfig(backbone_config=tiny_config(family), **options)
        content = config.to_dict()
        assert AttnResConfig(**config.to_dict()).to_dict() == content
        assert AttnResConfig.from_dict(config.to_dict()).to_dict() == content
        config.save_pretrained(tmp_path / family)
        assert AttnResConfig.from_pretrained(tmp_path / family).to_dict() == content
