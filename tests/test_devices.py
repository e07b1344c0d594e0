"""Weights spread over memory and disk: accelerate's hooks see every decoder layer and the depth mixer."""

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from helpers import random_attnres, random_tokens, relative_error

from attnres import AttnResForCausalLM

MODES = ("block", "full", "standard")


def places(model, on_disk):
    """A device map: the named modules on disk, all others in memory."""
    modules = ["model.embed_tokens", "model.norm", "lm_head", "model.depth_mixer"]
    modules += [f"model.layers.{index}" for index in range(model.config.num_hidden_layers)]
    if model.depth_mixer is None:
        modules.remove("model.depth_mixer")
    if getattr(model.model, "rotary_emb", None) is not None:
        modules.append("model.rotary_emb")
    return {name: "disk" if name in on_disk else "cpu" for name in modules}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "kimi_linear", "gemma3_text"])
def test_a_model_partly_on_disk_computes_and_generates_the_same(tmp_path, family, mode):
    model = random_attnres(family, mode)
    tokens = random_tokens(2, 7)
    options = {} if mode == "standard" else {"output_depth_weights": True}
    expected = model(tokens, **options)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "model")

    on_disk = ["model.layers.1", "model.layers.4", "model.depth_mixer"]
    loaded = AttnResForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places(model, on_disk),
        offload_folder=tmp_path / "offload",
        attn_implementation="eager",
    )
    assert loaded.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    assert loaded.model.layers[0].input_layernorm.weight.device.type == "cpu"
    if mode != "standard":
        assert loaded.depth_mixer.mlp_norm.query.device.type == "meta"
    output = loaded(tokens, **options)
    assert relative_error(output.logits, expected.logits) < 1e-4
    for weights, wanted in zip(output.depth_weights or (), expected.depth_weights or (), strict=True):
        torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(loaded.generate(tokens, max_new_tokens=4, do_sample=False), generated)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_model_whose_every_weight_is_offloaded_computes_the_same(tmp_path, mode):
    model = random_attnres("llama", mode)
    tokens = random_tokens(2, 7)
    expected = model(tokens).logits
    on_disk = places(model, ()).keys()
    model = dispatch_model(
        model,
        device_map=dict.fromkeys(on_disk, "disk"),
        main_device="cpu",
        offload_dir=tmp_path,
        skip_keys=model._skip_keys_device_placement,
    )
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert relative_error(model(tokens).logits, expected) < 1e-4


def test_an_inferred_device_map_never_splits_a_decoder_layer():
    model = random_attnres("qwen3")
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": total // 2, "disk": total}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    layers = [name for name in device_map if name.startswith("model.layers.")]
    assert all(name.count(".") == 2 for name in layers)
