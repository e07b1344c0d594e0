"""Implementations of attention and experts: equal results, chosen as on a plain model, refused as on a plain model."""

import logging

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES, tiny_config
from helpers import compiles, random_attnres, random_tokens, relative_error, short_config
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from attnres import AttnResConfig, AttnResForCausalLM

TOLERANCE = 1e-3  # see test_generation

PLAIN_CLASSES = {family: MODEL_FOR_CAUSAL_LM_MAPPING[type(tiny_config(family))] for family in FAMILIES}
# With transformers 5.23: gpt_oss and gemma2; olmoe, qwen3_next and kimi_linear.
WITHOUT_SDPA = [family for family in FAMILIES if not PLAIN_CLASSES[family]._supports_sdpa]
WITHOUT_FLEX = [family for family in FAMILIES if not PLAIN_CLASSES[family]._supports_flex_attn]
SDPA_DIFFERS = ("gemma2",)  # where a version takes it, it leaves out the soft cap of the attention logits
FLEX_NEEDS_A_GPU = ("gpt_oss",)  # attention sinks

FLEX = [family for family in FAMILIES if family not in (*WITHOUT_FLEX, *FLEX_NEEDS_A_GPU)]
EQUAL_CASES = [(family, "sdpa") for family in FAMILIES if family not in (*WITHOUT_SDPA, *SDPA_DIFFERS)] + [
    (family, "flex_attention") for family in FLEX
]
REFUSED_CASES = [(family, "sdpa") for family in WITHOUT_SDPA] + [(family, "flex_attention") for family in WITHOUT_FLEX]


def attention_module(model):
    return next(layer for layer in model.model.layers if layer.layer_type != "linear_attention").self_attn


@pytest.fixture
def warnings_of_transformers(caplog):
    """Captures what transformers logs; its logger does not propagate, so pytest alone would not see it."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def flex_uncompiled():
    """Replaces flex attention by its equation, because compiling it takes about ten seconds per family."""
    with torch.compiler.set_stance("force_eager"):
        yield


@compiles
@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", FLEX)
def test_compiled_flex_attention_gives_the_same_logits(family):
    model = random_attnres(family, layers=4)
    tokens = random_tokens(2, 11)
    expected = model(tokens).logits
    model.set_attn_implementation("flex_attention")
    assert relative_error(model(tokens).logits, expected) < TOLERANCE


@compiles
@torch.no_grad()
@pytest.mark.parametrize(("family", "implementation"), EQUAL_CASES)
def test_attention_implementations_give_the_same_logits_and_switch_without_a_warning(
    family, implementation, warnings_of_transformers, flex_uncompiled
):
    model = random_attnres(family, layers=4)
    tokens = random_tokens(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # left padding
    expected = model(tokens, attention_mask=mask).logits
    warnings_of_transformers.clear()
    model.set_attn_implementation(implementation)
    assert not [record for record in warnings_of_transformers.records if "attention" in record.getMessage()]

    assert model.config._attn_implementation == implementation
    assert model.config.backbone_config._attn_implementation == implementation
    assert attention_module(model).config._attn_implementation == implementation
    assert model.model.config is model.config

    logits = model(tokens, attention_mask=mask).logits
    assert relative_error(logits[1:], expected[1:]) < TOLERANCE
    assert relative_error(logits[0, 3:], expected[0, 3:]) < TOLERANCE
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens, attention_mask=mask).logits, expected)


@pytest.mark.parametrize(("family", "implementation"), REFUSED_CASES)
def test_an_attention_that_the_backbone_refuses_is_refused(family, implementation):
    plain = AutoModelForCausalLM.from_config(short_config(family, 4), attn_implementation="eager")
    model = random_attnres(family, layers=4)
    messages = []
    for each in (plain, model):
        with pytest.raises(ValueError, match="does not support an attention implementation") as caught:
            each.set_attn_implementation(implementation)
        messages.append(str(caught.value).replace(type(each).__name__, "..."))
    assert messages[0] == messages[1]
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        config = AttnResConfig(backbone_config=short_config(family, 4), attn_implementation=implementation)
        AttnResForCausalLM(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_attention_is_that_of_the_backbone(family):
    plain = AutoModelForCausalLM.from_config(short_config(family, 4))
    model = AttnResForCausalLM(AttnResConfig(backbone_config=short_config(family, 4)))
    assert attention_module(model).config._attn_implementation == plain.config._attn_implementation
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert model.config._experts_implementation == plain.config._experts_implementation


def test_an_unknown_attention_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        random_attnres("llama").set_attn_implementation("nonsense")


@torch.no_grad()
def test_attention_weights_need_eager_attention_as_in_the_plain_backbone():
    model = random_attnres("qwen3", attn_implementation="sdpa")
    assert not model(random_tokens(1, 5), output_attentions=True).attentions
    model.set_attn_implementation("eager")
    weights = model(random_tokens(1, 5), output_attentions=True).attentions
    assert [tensor.shape for tensor in weights] == [(1, 4, 5, 5)] * 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "mistral", "deepseek_v3", "gemma3_text"])
@pytest.mark.parametrize("mode", ["full", "standard"])
def test_attention_implementations_give_the_same_logits_in_the_other_modes(family, mode):
    model = random_attnres(family, mode)
    tokens = random_tokens(2, 11)
    expected = model(tokens).logits
    model.set_attn_implementation("sdpa")
    assert relative_error(model(tokens).logits, expected) < TOLERANCE


def experts_modules(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_implementations_give_the_same_logits_and_gradients(family, implementation):
    model = random_attnres(family)
    tokens = random_tokens(2, 9)

    def step(name):
        model.set_experts_implementation(name)
        modules = experts_modules(model)
        assert modules
        assert {module.config._experts_implementation for module in modules} == {name}
        assert model.config._experts_implementation == name
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().mean().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = step("eager")
    logits, gradients = step(implementation)
    assert relative_error(logits, expected) < TOLERANCE
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < 0.01 or gradient.norm() < 1e-6, name


def test_a_backbone_without_experts_ignores_an_experts_implementation_as_a_plain_one_does():
    plain = AutoModelForCausalLM.from_config(short_config("llama"))
    model = random_attnres("llama")
    for each in (plain, model):
        each.set_experts_implementation("batched_mm")
    assert model.config._experts_implementation == plain.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="does not support setting experts implementation"):
        model.set_experts_implementation("grouped_mm")


def test_implementations_are_chosen_when_loading(tmp_path):
    random_attnres("qwen3_moe").save_pretrained(tmp_path)
    model = AttnResForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="batched_mm"
    )
    assert attention_module(model).config._attn_implementation == "eager"
    assert {module.config._experts_implementation for module in experts_modules(model)} == {"batched_mm"}


def test_implementations_of_two_models_with_one_configuration_class_are_independent():
    first, second = random_attnres("llama"), random_attnres("llama")
    first.set_attn_implementation("sdpa")
    assert second.config._attn_implementation == second.config.backbone_config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_claims_what_its_family_claims(family):
    plain = AutoModelForCausalLM.from_config(short_config(family))
    model = AttnResForCausalLM.from_backbone(plain)
    supports = ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn")
    for name in (*supports, "_is_stateful", "_can_compile_fullgraph"):
        assert getattr(model, name) == getattr(plain, name), name
    assert not AttnResForCausalLM._can_set_experts_implementation()  # the class may have any backbone
    for each in (model, model.model):
        assert each._can_set_experts_implementation() == plain._can_set_experts_implementation()
