"""Weights spread over memory and disk: accelerate's hooks apply to every decoder layer and the depth mixer."""

import importlib

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import send_to_device
from helpers import random_attnres, random_tokens, relative_error

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.decoder_layer import LayerQueries
from attnres.depth_mixer import DepthMixer, PseudoQuery

MODES = ("block", "full", "standard")


def places(model, on_disk):
    """Returns a device map with the named modules on disk and all others in memory."""
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


def device_of(device_map, name):
    """Returns the device of a parameter: that of the only entry whose module contains it."""
    (entry,) = (module for module in device_map if module == "" or name.startswith(f"{module}."))
    return device_map[entry]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "kimi_linear", "gemma3_text"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_an_inferred_device_map_never_splits_a_decoder_layer(family, mode, share):
    model = random_attnres(family, mode)
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    device_map = infer_auto_device_map(
        model,
        max_memory={0: int(share * total), 1: int(share * total), "cpu": total},
        no_split_module_classes=model._no_split_modules,
    )
    for index in range(5):
        names = [name for name, _ in model.named_parameters() if name.startswith(f"model.layers.{index}.")]
        assert len({device_of(device_map, name) for name in names}) == 1, index
    tied = model.config.tie_word_embeddings
    assert tied == (family == "gemma3_text")
    if tied:
        assert device_of(device_map, "lm_head.weight") == device_of(device_map, "model.embed_tokens.weight")


def test_the_papers_48b_model_is_laid_out_over_two_devices_and_memory():
    with torch.device("meta"):
        model = AttnResForCausalLM(AttnResConfig(dtype="bfloat16")).to(torch.bfloat16)
    size = {name: parameter.numel() * parameter.element_size() for name, parameter in model.named_parameters()}
    assert sum(size.values()) > 90 * 2**30
    limits = {0: 40 * 2**30, 1: 40 * 2**30, "cpu": 60 * 2**30}
    device_map = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=model._no_split_modules)
    assert all(device_map[name] in limits for name in device_map)  # nothing is left for the disk
    used = {}
    for name, count in size.items():
        used[device_of(device_map, name)] = used.get(device_of(device_map, name), 0) + count
    assert used.keys() == limits.keys() and all(used[device] <= limits[device] for device in limits)
    # In order, so that a hidden state crosses once from each device to the next.
    order = [device_of(device_map, f"model.layers.{index}.input_layernorm.weight") for index in range(27)]
    assert order == sorted(order, key=list(limits).index)
    mixers = {device_of(device_map, name) for name in size if "depth_mixer" in name}
    assert len(mixers) == 1


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma3_text"])
def test_max_memory_puts_what_does_not_fit_on_disk_and_logits_stay(tmp_path, family, mode):
    model = random_attnres(family, mode)
    tokens = random_tokens(2, 7)
    model.save_pretrained(tmp_path / "model")
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    loaded = AttnResForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.6 * total)},
        offload_folder=tmp_path / "offload",
        attn_implementation="eager",
    )
    assert {str(place) for place in loaded.hf_device_map.values()} == {"cpu", "disk"}
    assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-4
    generated = loaded.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("part", ["mlp_norm", "output_norm"])
def test_a_depth_mixer_whose_parts_are_on_two_devices_gives_queries_on_one(part):
    mixer = DepthMixer(3, 8).to("meta")
    setattr(mixer, part, getattr(DepthMixer(3, 8), part))
    sublayers = mixer()[:-1]
    assert {each.query.device.type for each in sublayers} == {"meta"}


def test_pseudo_queries_follow_a_decoder_layer_to_its_device():
    query = torch.ones(4)
    moved = send_to_device((LayerQueries(PseudoQuery(query), PseudoQuery(query, query)), query), "meta")
    tensors = [*moved[0].attention, *moved[0].mlp]
    assert tensors[1] is None and {each.device.type for each in tensors if each is not None} == {"meta"}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_model_split_between_all_gpus_and_memory_computes_and_generates_the_same(tmp_path, mode):
    model = random_attnres("qwen3", mode, layers=12)
    tokens = random_tokens(2, 7)
    model.save_pretrained(tmp_path)
    count = torch.cuda.device_count()
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    limits = {**dict.fromkeys(range(count), int(0.8 * total / count)), "cpu": 2 * total}
    loaded = AttnResForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=limits, attn_implementation="eager"
    )
    assert set(loaded.hf_device_map.values()) == {*range(count), "cpu"}
    tokens_there = tokens.to("cuda:0")
    assert relative_error(loaded(tokens_there).logits.cpu(), model(tokens).logits) < 1e-3
    generated = loaded.generate(tokens_there, max_new_tokens=4, do_sample=False).cpu()
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_accelerate_dispatches_a_folder_that_is_saved_by_names_in_memory(tmp_path, family):
    model, tokens = random_attnres(family), random_tokens(2, 7)
    model.save_pretrained(tmp_path / "model", save_original_format=False)  # accelerate knows no other names
    with init_empty_weights():
        dispatched = AttnResForCausalLM(model.config)
    dispatched = load_checkpoint_and_dispatch(
        dispatched,
        str(tmp_path / "model"),
        device_map=places(model, ["model.layers.1", "model.layers.3"]),
        offload_folder=str(tmp_path / "offload"),
    ).eval()
    # Mapped memory is aligned otherwise, which rounds otherwise.
    assert relative_error(dispatched(tokens).logits, model(tokens).logits) < 1e-5
    again = AttnResForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative_error(again(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.parametrize("mode", ["block", "full", "standard"])
def test_replicas_of_data_parallel_compute_the_same_and_give_gradients(mode, monkeypatch):
    """`DataParallel` runs copies whose parameters are plain tensors; here all of them on one device."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [
            [each.detach().clone() if detach else each * 1 for each in tensors] for _ in devices
        ],
    )
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)
    model, tokens = random_attnres("llama", mode), random_tokens(4, 7)
    expected = model(tokens, labels=tokens, use_cache=False)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    copies = replicate.replicate(model, [0, 1])
    outputs = [copy(part, labels=part, use_cache=False) for copy, part in zip(copies, tokens.split(2), strict=True)]
    torch.stack([output.loss for output in outputs]).mean().backward()
    assert relative_error(torch.cat([output.logits for output in outputs]), expected.logits) < 1e-4
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-3, name
