"""What a forward pass takes and returns: losses, logits, hidden states, attentions, router logits, depth weights."""

import copy
import pickle
import threading

import pytest
import torch
from families import FAMILIES, LINEAR_FAMILIES, MOE_FAMILIES
from helpers import random_attnres, random_tokens, relative_error, short_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeForCausalLM
from transformers.utils.output_capturing import OutputRecorder

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel

TOLERANCE = 1e-3  # see test_generation
MODES = ("block", "full", "standard")


def plain_and_converted(family, attn_implementation="eager", layers=5, **overrides):
    """A plain model and its conversion, which computes the same because its pseudo-queries are zero."""
    torch.manual_seed(0)
    config = short_config(family, layers, **overrides)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    return plain, AttnResForCausalLM.from_backbone(plain, layers_per_block=2)


def manual_loss(logits, labels, reduction="mean"):
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
    )


# In older versions of transformers the router of granitemoe returns the chosen experts first, and the plain class
# records no router logits.
RECORDED_ROUTERS = [
    family
    for family in MOE_FAMILIES
    if family != "granitemoe" or "router_logits" in GraniteMoeForCausalLM._can_record_outputs
]


# ------------------------------------------------------------------------------------------------------------- losses


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_cross_entropy_of_shifted_labels(mode):
    model = random_attnres("qwen3", mode)
    tokens = random_tokens(2, 9)
    labels = tokens.masked_fill(torch.arange(9) < 3, -100)
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.loss, manual_loss(output.logits, labels))


@torch.no_grad()
def test_num_items_in_batch_divides_the_summed_loss():
    model = random_attnres("llama")
    tokens = random_tokens(2, 9)
    output = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(5))
    torch.testing.assert_close(output.loss, manual_loss(output.logits, tokens, "sum") / 5)


@torch.no_grad()
@pytest.mark.parametrize("family", RECORDED_ROUTERS)
def test_the_loss_of_experts_is_that_of_the_plain_backbone(family):
    plain, model = plain_and_converted(family, router_aux_loss_coef=0.7)
    tokens = random_tokens(2, 9)
    mask = torch.ones_like(tokens).index_fill(1, torch.tensor([8]), 0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    for option in (None, False, True):
        expected = plain(**inputs, **({} if option is None else {"output_router_logits": option}))
        output = model(**inputs, output_router_logits=option)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-4)
        if getattr(expected, "aux_loss", None) is None:
            assert output.aux_loss is None
        else:
            torch.testing.assert_close(output.aux_loss, expected.aux_loss, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.loss, manual_loss(output.logits, tokens) + 0.7 * output.aux_loss)


@torch.no_grad()
def test_router_logits_are_returned_where_the_configuration_asks_for_them():
    model = random_attnres("qwen3_moe", output_router_logits=True)
    output = model(random_tokens(2, 5))
    assert len(output.router_logits) == 2
    assert output.aux_loss is not None


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite", "kimi_linear"])
def test_logits_to_keep_selects_positions(family):
    model = random_attnres(family)
    tokens = random_tokens(2, 9)
    logits = model(tokens).logits
    last = model(tokens, logits_to_keep=2).logits
    torch.testing.assert_close(last, logits[:, -2:], rtol=1e-4, atol=1e-4)
    chosen = model(tokens, logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(chosen, logits[:, [0, 4]], rtol=1e-4, atol=1e-4)
    per_row = model(tokens, logits_to_keep=torch.tensor([[0, 4, 5], [1, 2, 8]])).logits
    expected = torch.stack([logits[0, [0, 4, 5]], logits[1, [1, 2, 8]]])
    torch.testing.assert_close(per_row, expected, rtol=1e-4, atol=1e-4)
    mask = tokens > 40
    torch.testing.assert_close(model(tokens, logits_to_keep=mask).logits, logits[mask], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- inputs


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_as_inputs_equal_their_tokens(family):
    model = random_attnres(family)
    tokens = random_tokens(2, 7)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)


@pytest.mark.parametrize("inputs", [(), ("input_ids", "inputs_embeds")], ids=["none", "both"])
def test_tokens_or_embeddings_are_needed_but_not_both(inputs):
    model = random_attnres("llama")
    values = {"input_ids": random_tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 40)}
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**{name: values[name] for name in inputs})


# Linear attention finds packed sequences by cu_seqlens, which only its optional kernels take.
PACKED_FAMILIES = [family for family in FAMILIES if family not in LINEAR_FAMILIES]
WITHOUT_SDPA = ("gpt_oss", "gemma2")  # as their plain classes say
PACKED_CASES = [(family, "eager") for family in PACKED_FAMILIES] + [
    (family, "sdpa") for family in PACKED_FAMILIES if family not in WITHOUT_SDPA
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "attention"), PACKED_CASES)
def test_packed_sequences_do_not_see_each_other(family, attention):
    model = random_attnres(family, attn_implementation=attention)
    tokens = random_tokens(1, 12)
    position_ids = torch.tensor([[*range(5), *range(7)]])
    packed = model(tokens, position_ids=position_ids, use_cache=False).logits
    apart = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], dim=1)
    assert relative_error(packed, apart) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_may_look_both_ways_as_in_the_plain_backbone(family):
    plain, model = plain_and_converted(family)
    tokens = random_tokens(2, 9)
    causal = plain(tokens).logits
    expected = plain(tokens, is_causal=False).logits
    assert relative_error(expected, causal) > 0.1
    assert relative_error(model(tokens, is_causal=False).logits, expected) < TOLERANCE
    assert relative_error(model(tokens).logits, causal) < TOLERANCE  # for that one call only


@torch.no_grad()
def test_a_four_dimensional_mask_is_used_as_it_is():
    plain, model = plain_and_converted("llama")
    tokens = random_tokens(1, 6)
    mask = torch.full((1, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[..., 1] = mask.min()  # nobody sees token 1
    expected = plain(tokens, attention_mask=mask).logits
    assert relative_error(expected, plain(tokens).logits) > 0.1
    assert relative_error(model(tokens, attention_mask=mask).logits, expected) < TOLERANCE


# ------------------------------------------------------------------------------------------------------------ outputs


def layer_inputs(model):
    """Returns the input of each decoder layer's first norm, and the input of the head."""
    seen = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_each_layer_received_and_the_final_normed_state(family, mode):
    model = random_attnres(family, mode)
    seen = layer_inputs(model)
    output = model(random_tokens(2, 7), output_hidden_states=True)
    assert len(output.hidden_states) == len(seen) == 6
    for state, expected in zip(output.hidden_states, seen, strict=True):
        assert state.shape == (2, 7, 40)
        assert torch.equal(state, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_and_router_logits_with_zero_queries_are_those_of_the_plain_backbone(family):
    plain, model = plain_and_converted(family)
    options = {"output_attentions": True, "output_router_logits": family in RECORDED_ROUTERS}
    tokens = random_tokens(2, 7)
    expected, output = plain(tokens, **options), model(tokens, **options)
    for name in ("attentions", "router_logits"):
        values, wanted = getattr(output, name) or (), getattr(expected, name, None) or ()
        if wanted:  # older versions of some families record no router logits
            assert len(values) == len(wanted), name
            for value, tensor in zip(values, wanted, strict=True):
                torch.testing.assert_close(value, tensor, rtol=1e-3, atol=1e-4)
    assert len(output.attentions) == (1 if family in LINEAR_FAMILIES else 5)
    assert bool(output.router_logits) == (family in RECORDED_ROUTERS)


SOURCES = {
    # 5 decoder layers: attention, MLP, attention, MLP, ..., output
    "block of 1": ("block", 1, [1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
    "block of 2": ("block", 2, [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]),
    "block of 3": ("block", 3, [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3]),
    "block of 5": ("block", 5, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
    "full": ("full", 2, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
@pytest.mark.parametrize("case", SOURCES)
def test_depth_weights_have_one_column_per_source_and_sum_to_one(family, case):
    mode, layers_per_block, expected = SOURCES[case]
    model = random_attnres(family, mode, layers_per_block)
    weights = model(random_tokens(2, 7), output_depth_weights=True).depth_weights
    assert [tensor.shape for tensor in weights] == [(2, 7, sources) for sources in expected]
    for tensor in weights:
        assert tensor.dtype == torch.float32
        assert (tensor >= 0).all()
        torch.testing.assert_close(tensor.sum(-1), torch.ones(2, 7))
    assert max(tensor.std().item() for tensor in weights) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("case", SOURCES)
def test_depth_weights_are_softmaxes_over_normed_sources_and_mix_the_sublayers_inputs(case):
    """Rebuilds the sources from the sublayer outputs, and the weights from the pseudo-queries and gains."""
    mode, layers_per_block, _ = SOURCES[case]
    model = random_attnres("llama", mode, layers_per_block)
    outputs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
        layer.mlp.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    inputs = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    tokens = random_tokens(2, 7)
    weights = model(tokens, output_depth_weights=True).depth_weights

    mixer = model.depth_mixer
    queries, gains = [], []
    for layer in range(5):
        for part in (mixer.attention_norm, mixer.mlp_norm):
            queries.append(part.query[layer, 0])
            gains.append(part.weight[layer])
    queries.append(mixer.output_norm.query[0])
    gains.append(mixer.output_norm.weight)

    size = 1 if mode == "full" else 2 * layers_per_block
    for index, (mixture, tensor) in enumerate(zip(inputs, weights, strict=True)):
        blocks = [sum(outputs[start : min(start + size, index)]) for start in range(0, index, size)]
        sources = torch.stack([model.get_input_embeddings()(tokens), *blocks], dim=-1)
        keys = nn.functional.rms_norm(sources.mT, (40,), eps=model.config.rms_norm_eps) * gains[index]
        torch.testing.assert_close(tensor, torch.softmax(keys @ queries[index], dim=-1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mixture, (sources * tensor.unsqueeze(-2)).sum(-1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_depth_weights_are_absent_unless_asked_for_and_an_error_in_standard_mode():
    assert random_attnres("llama")(random_tokens(1, 3)).depth_weights is None
    with pytest.raises(ValueError, match="output_depth_weights=True needs residual_mode"):
        random_attnres("llama", "standard")(random_tokens(1, 3), output_depth_weights=True)


@torch.no_grad()
def test_depth_weights_of_one_decoding_step_are_those_of_its_token():
    model = random_attnres("llama")
    tokens = random_tokens(2, 7)
    expected = model(tokens, output_depth_weights=True).depth_weights
    cache = model(tokens[:, :6]).past_key_values
    step = model(tokens[:, 6:], past_key_values=cache, output_depth_weights=True).depth_weights
    for weights, wanted in zip(step, expected, strict=True):
        torch.testing.assert_close(weights, wanted[:, 6:], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_tuple_holds_the_same_outputs_in_the_same_order(mode):
    model = random_attnres("qwen3_moe", mode)
    tokens = random_tokens(2, 7)
    options = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    if mode != "standard":
        options["output_depth_weights"] = True
    output = model(tokens, labels=tokens, **options)
    values = model(tokens, labels=tokens, return_dict=False, **options)
    assert isinstance(values, tuple)
    for value, (name, expected) in zip(values, output.items(), strict=True):
        if name != "past_key_values":
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
    base = model.model(tokens, return_dict=False, **options)
    assert isinstance(base, tuple)
    assert torch.equal(model.lm_head(base[0]), output.logits)


@torch.no_grad()
def test_the_configuration_can_ask_for_outputs():
    model = random_attnres("qwen3_moe")
    model.config.output_hidden_states = True
    model.config.output_router_logits = True
    output = model(random_tokens(1, 4))
    assert len(output.hidden_states) == 6
    assert len(output.router_logits) == 2


@pytest.mark.skipif(
    "num_hidden_layers_key" not in OutputRecorder.__dataclass_fields__,
    reason="this version of transformers counts selected layers, not hidden states",
)
@torch.no_grad()
def test_some_hidden_states_can_be_selected_as_in_the_plain_backbone():
    plain, model = plain_and_converted("llama")
    tokens = random_tokens(1, 4)
    expected = plain(tokens, output_hidden_states=[1, -1]).hidden_states
    states = model(tokens, output_hidden_states=[1, -1]).hidden_states
    assert [state is None for state in states] == [state is None for state in expected]
    torch.testing.assert_close(states[-1], expected[-1], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ several models


@torch.no_grad()
def test_two_families_in_one_process_each_capture_their_own_outputs():
    options = {"output_attentions": True, "output_router_logits": True, "output_hidden_states": True}
    models = {name: random_attnres(name) for name in ("qwen3_moe", "llama", "kimi_linear", "gpt_oss")}
    tokens = random_tokens(1, 5)
    for _ in range(2):
        for name, model in models.items():
            output = model(tokens, **options)
            attentions, routers = {
                "qwen3_moe": (5, 2),
                "llama": (5, 0),
                "kimi_linear": (1, 4),
                "gpt_oss": (5, 5),
            }[name]
            assert len(output.attentions) == attentions, name
            assert len(output.router_logits or ()) == routers, name
            assert len(output.hidden_states) == 6, name


@torch.no_grad()
def test_two_models_in_two_threads_do_not_mix_their_captures():
    models = {name: random_attnres(name) for name in ("llama", "qwen3")}
    tokens = random_tokens(2, 9)
    options = {"output_hidden_states": True, "output_depth_weights": True}
    expected = {name: model(tokens, **options) for name, model in models.items()}
    problems = []

    @torch.no_grad()
    def work(name):
        for _ in range(10):
            output = models[name](tokens, **options)
            for field in ("hidden_states", "depth_weights"):
                for value, wanted in zip(output[field], expected[name][field], strict=True):
                    if not torch.allclose(value, wanted, atol=1e-5):
                        problems.append((name, field))

    threads = [threading.Thread(target=work, args=(name,)) for name in models for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "kimi_linear"])
def test_a_deep_copy_and_a_pickle_of_a_model_compute_the_same_and_share_nothing(family):
    model = random_attnres(family)
    tokens = random_tokens(1, 5)
    expected = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, expected)
        twin.depth_mixer.output_norm.query.zero_()
        twin.config.backbone_config.rms_norm_eps = 0.5
        assert torch.equal(model(tokens).logits, expected)


def test_copies_and_pickles_of_a_configuration_are_equal_and_share_nothing():
    config = AttnResConfig(backbone_config=short_config("qwen3_moe"), layers_per_block=3)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.to_dict() == config.to_dict()
        assert type(twin.backbone_config) is type(config.backbone_config)
        twin.vocab_size = 101
        assert config.vocab_size == 97
        assert twin.backbone_config.vocab_size == 101


@torch.no_grad()
def test_the_model_without_a_head_is_the_body_of_the_causal_model():
    model = random_attnres("gemma3_text")
    tokens = random_tokens(1, 5)
    body = AttnResModel(model.config).eval()
    body.load_state_dict(model.model.state_dict())
    assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
