"""LoRA with PEFT: backbone modules keep their names, so adapters find them."""

import pytest
import torch
from helpers import random_attnres, random_tokens, randomise_depth, relative_error
from peft import LoraConfig, PeftModel, get_peft_model

# PEFT reads the old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]

TARGETS = {"attention": ["q_proj", "v_proj"], "all": "all-linear"}


def trained_adapter(model, **options):
    """A LoRA adapter after two steps, so that it is not the identity any more."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=3, task_type="CAUSAL_LM", **options)).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.3)
    tokens = random_tokens(2, 9)
    for _ in range(2):
        peft_model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft_model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "kimi_linear"])
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_trains_merges_and_loads_again(tmp_path, family, targets):
    model = random_attnres(family)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before = model(tokens).logits
    peft_model = trained_adapter(model, target_modules=TARGETS[targets])
    adapted = [module for module in peft_model.modules() if hasattr(module, "lora_A")]
    full_attention_layers = sum(layer.layer_type != "linear_attention" for layer in model.model.layers)
    assert len(adapted) >= full_attention_layers
    assert not [name for name, p in peft_model.named_parameters() if p.requires_grad and "lora_" not in name]
    with torch.no_grad():
        expected = peft_model(tokens).logits
    assert relative_error(expected, before) > 0.01

    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_attnres(family), tmp_path).eval()
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, expected) < 1e-4
    merged = peft_model.merge_and_unload()
    assert type(merged) is type(model)
    with torch.no_grad():
        assert relative_error(merged(tokens).logits, expected) < 1e-3


@pytest.mark.parametrize("mode", ["block", "full"])
def test_the_depth_mixer_can_be_trained_in_full_beside_an_adapter(tmp_path, mode):
    model = random_attnres("qwen3", mode)
    start = {name: p.detach().clone() for name, p in model.depth_mixer.named_parameters()}
    peft_model = trained_adapter(model, target_modules=["q_proj"], modules_to_save=["depth_mixer"])
    trained = peft_model.get_base_model().depth_mixer.modules_to_save["default"]
    for name, parameter in trained.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        expected = peft_model(tokens).logits
    peft_model.save_pretrained(tmp_path)

    # Another depth mixer in the base model: the adapter brings its own.
    loaded = PeftModel.from_pretrained(randomise_depth(random_attnres("qwen3", mode), seed=9), tmp_path).eval()
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, expected) < 1e-4

    merged = loaded.merge_and_unload()
    with torch.no_grad():
        assert relative_error(merged(tokens).logits, expected) < 1e-3
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        assert relative_error(again(tokens).logits, expected) < 1e-3


@torch.no_grad()
def test_an_adapter_generates_and_can_be_switched_off():
    model = random_attnres("llama")
    prompt = random_tokens(1, 5)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **options)
    with torch.enable_grad():
        peft_model = trained_adapter(model, target_modules=["q_proj", "v_proj"])
    with_cache = peft_model.generate(input_ids=prompt, **options)
    assert torch.equal(with_cache, peft_model.generate(input_ids=prompt, use_cache=False, **options))
    with peft_model.disable_adapter():
        assert torch.equal(peft_model.generate(input_ids=prompt, **options), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_adapter_gets_its_gradients_with_activation_checkpointing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        peft_model = get_peft_model(random_attnres("qwen3"), LoraConfig(r=3, target_modules=["v_proj"])).train()
        if checkpointing:
            enable = getattr(peft_model, "activation_checkpointing_enable", peft_model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
            peft_model.enable_input_require_grads()
        tokens = random_tokens(2, 9)
        peft_model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 10
    for name, gradient in gradients[0].items():
        assert gradients[1][name] is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)
