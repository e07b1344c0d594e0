"""Conversions between layouts: what is on disk afterwards, bit by bit, and what the result computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversion.disk import assert_same_tensors, bytes_of, tensors_of
from families import FAMILIES
from helpers import random_attnres, random_tokens, short_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM
from attnres.backbones import causal_lm_class
from attnres.conversion import CheckpointError, convert
from attnres.conversion.converter import DEPTH_SHARD


@pytest.fixture
def save_plain(tmp_path):
    def save(family="llama", folder="plain", dtype=torch.float32, shard="50GB", **overrides):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(short_config(family, **overrides)).to(dtype)
        model.save_pretrained(tmp_path / folder, max_shard_size=shard)
        return tmp_path / folder

    return save


@pytest.fixture
def save_trained(tmp_path):
    def save(family="kimi_linear", folder="trained", **options):
        random_attnres(family, **options).save_pretrained(tmp_path / folder, max_shard_size="60KB")
        return tmp_path / folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_of_every_family_converts_there_and_back(family, save_plain, tmp_path):
    plain = save_plain(family, shard="60KB")
    before = bytes_of(plain)
    outcome = convert(plain, tmp_path / "attnres", layers_per_block=2, verify="full")
    assert outcome.report["p999_logit_difference"] < 1e-3 * outcome.report["logit_std"]
    assert outcome.report["top1_agreement"] == 1.0
    model = AttnResForCausalLM.from_pretrained(tmp_path / "attnres")
    assert model.config.layers_per_block == 2
    in_memory = AttnResForCausalLM.from_pretrained(plain, layers_per_block=2)
    with torch.no_grad():
        assert torch.equal(model(random_tokens(2, 7)).logits, in_memory(random_tokens(2, 7)).logits)
    convert(tmp_path / "attnres", tmp_path / "back", to="prenorm", verify="none")
    assert_same_tensors(tmp_path / "back", plain)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is causal_lm_class(short_config(family))
    assert bytes_of(plain) == before


def test_weight_shards_are_carried_over_to_the_byte_and_one_small_shard_is_added(save_plain, tmp_path):
    plain = save_plain(shard="60KB")
    convert(plain, tmp_path / "attnres", verify="none")
    old, new = bytes_of(plain), bytes_of(tmp_path / "attnres")
    shards = {name for name in old if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert all(new[name] == old[name] for name in shards)
    assert {name for name in new if name.endswith(".safetensors")} - shards == {DEPTH_SHARD}
    index = json.loads(new["model.safetensors.index.json"])
    assert len(index["weight_map"]) == len(tensors_of(plain)) + 4 * 5 + 2


def test_a_single_file_makes_room_for_the_depth_shard(save_plain, tmp_path):
    plain = save_plain()
    convert(plain, tmp_path / "attnres", verify="none")
    # transformers would read model.safetensors and not look at the index.
    assert not (tmp_path / "attnres" / "model.safetensors").exists()
    assert len(AttnResForCausalLM.from_pretrained(tmp_path / "attnres").state_dict()) == len(tensors_of(plain)) + 6
    convert(tmp_path / "attnres", tmp_path / "back", to="prenorm", verify="none")
    assert bytes_of(tmp_path / "back")["model.safetensors"] == bytes_of(plain)["model.safetensors"]
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
def test_depth_tensors_have_the_dtype_of_the_weights(dtype, tied, save_plain, tmp_path):
    plain = save_plain(dtype=dtype, tie_word_embeddings=tied, initializer_range=0.1)
    outcome = convert(plain, tmp_path / "attnres", verify="full")
    tensors = tensors_of(tmp_path / "attnres")
    queries = [tensor for name, tensor in tensors.items() if name.endswith("_res_proj.weight")]
    gains = [tensor for name, tensor in tensors.items() if name.endswith("_res_norm.weight")]
    assert all(tensor.dtype == dtype and tensor.shape == (1, 40) and not tensor.any() for tensor in queries)
    assert all(tensor.dtype == dtype and tensor.shape == (40,) and (tensor == 1).all() for tensor in gains)
    assert ("lm_head.weight" in tensors) is not tied
    assert outcome.report["stored_dtype"] == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    if dtype == torch.bfloat16:  # compared in float32, beside the source's own rounding
        assert outcome.report["relative_logit_error"] < 1e-5
        assert outcome.report["source_rounded_to_stored_dtype"]["relative_logit_error"] > 1e-4


def test_tokenizer_template_licence_and_readme_come_along_and_foreign_code_does_not(save_plain, tmp_path):
    plain = save_plain()
    companions = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "README.md",
    )
    for name in companions:
        (plain / name).write_text(name)
    for name in ("modeling_evil.py", "optimizer.pt", "pytorch_model.bin"):
        (plain / name).write_text("print('run me')")
    convert(plain, tmp_path / "attnres", verify="none")
    for name in companions:
        assert (tmp_path / "attnres" / name).read_text() == name
    assert (tmp_path / "attnres" / "generation_config.json").exists()
    assert not {"modeling_evil.py", "optimizer.pt", "pytorch_model.bin"} & set(bytes_of(tmp_path / "attnres"))
    assert (tmp_path / "attnres" / "modeling_attnres.py").exists()  # what remote code needs


def test_linked_shards_share_their_blocks_and_copies_leave_the_source_alone(save_plain, tmp_path):
    plain = save_plain(shard="60KB")
    before = bytes_of(plain)
    convert(plain, tmp_path / "linked", verify="none", link=True)
    convert(plain, tmp_path / "copied", verify="none")
    shard = next(name for name in before if name.endswith(".safetensors"))
    assert (tmp_path / "linked" / shard).stat().st_ino == (plain / shard).stat().st_ino
    model = AttnResForCausalLM.from_pretrained(tmp_path / "copied")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "copied", max_shard_size="60KB")
    assert bytes_of(plain) == before


def test_kimi_k3_layout_has_the_published_names_and_units_and_comes_back_to_the_byte(save_trained, tmp_path):
    source = save_trained()
    convert(source, tmp_path / "k3", to="kimi-k3", verify="full")
    config = json.loads((tmp_path / "k3" / "config.json").read_text())
    assert (config["model_type"], config["attn_res_block_size"]) == ("kimi_linear", 2)
    assert config["linear_attn_config"]["full_attn_layers"] == [4]  # counted from 1
    assert config["linear_attn_config"]["kda_layers"] == [1, 2, 3, 5]
    assert (config["num_experts"], config["num_experts_per_token"], config["first_k_dense_replace"]) == (5, 2, 1)
    assert config["mla_use_nope"] is True and config["moe_router_activation_func"] == "sigmoid"
    tensors = tensors_of(tmp_path / "k3")
    assert tensors["model.layers.0.self_attn.A_log"].shape == (4,)
    assert tensors["model.layers.1.self_attention_res_proj.weight"].shape == (1, 40)
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in tensors
    assert "model.layers.0.mlp.gate_proj.weight" in tensors  # every engine looks for the dense layer there
    convert(tmp_path / "k3", tmp_path / "back", verify="full")
    assert_same_tensors(tmp_path / "back", source)
    old, new = (AttnResForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    assert new.config.layers_per_block == 2
    assert new.config.backbone_config.layer_types == old.config.backbone_config.layer_types
    with torch.no_grad():
        assert torch.equal(new(random_tokens(2, 7)).logits, old(random_tokens(2, 7)).logits)


def test_a_plain_kimi_linear_goes_to_the_k3_layout_directly(save_plain, tmp_path):
    convert(save_plain("kimi_linear"), tmp_path / "k3", to="kimi-k3", layers_per_block=3, verify="full")
    assert json.loads((tmp_path / "k3" / "config.json").read_text())["attn_res_block_size"] == 3
    assert not tensors_of(tmp_path / "k3")["model.output_attn_res_proj.weight"].any()


def test_files_of_a_result_have_the_same_mode(save_plain, tmp_path):
    convert(save_plain(shard="60KB"), tmp_path / "attnres", verify="none")
    mode = (tmp_path / "attnres" / "config.json").stat().st_mode
    assert (tmp_path / "attnres" / DEPTH_SHARD).stat().st_mode == mode


def test_a_model_that_cannot_be_run_is_one_line(save_plain, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("strides should be\nmultiple of 16 bytes")

    monkeypatch.setattr("attnres.conversion.verification._run", fail)
    with pytest.raises(CheckpointError, match=r"could not run \(strides should be multiple.*--verify none"):
        convert(save_plain(), tmp_path / "attnres")


def test_a_k3_folder_is_not_mistaken_for_a_plain_kimi_linear(save_trained, tmp_path):
    convert(save_trained(), tmp_path / "k3", to="kimi-k3", verify="none")
    with pytest.raises(ValueError, match="attnres convert SRC DST --from kimi-k3"):
        AttnResForCausalLM.from_pretrained(tmp_path / "k3")


def test_the_text_part_of_a_multimodal_k3_checkpoint_is_understood(save_trained, tmp_path):
    source = save_trained()
    convert(source, tmp_path / "k3", to="kimi-k3", verify="none")
    nested = tmp_path / "nested"
    nested.mkdir()
    text = json.loads((tmp_path / "k3" / "config.json").read_text())
    (nested / "config.json").write_text(json.dumps({"model_type": "kimi_k3", "text_config": text}))
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of(tmp_path / "k3").items()}
    save_file({**tensors, "vision_tower.patch.weight": torch.ones(3)}, nested / "model.safetensors")
    outcome = convert(nested, tmp_path / "back", from_layout="kimi-k3", verify="none")
    assert outcome.left_out == ["vision_tower.patch.weight"]
    assert_same_tensors(tmp_path / "back", source)


def test_trained_pseudo_queries_have_no_plain_equivalent(save_trained, tmp_path):
    with pytest.raises(CheckpointError, match="trained pseudo-queries"):
        convert(save_trained("llama"), tmp_path / "plain", to="prenorm", verify="none")
    assert not (tmp_path / "plain").exists()


def test_other_depth_options_are_exact_while_queries_are_zero_and_else_need_a_new_start(
    save_plain, save_trained, tmp_path
):
    convert(save_plain(), tmp_path / "zero", layers_per_block=2, verify="none")
    convert(tmp_path / "zero", tmp_path / "full", residual_mode="full", verify="full")
    assert AttnResForCausalLM.from_pretrained(tmp_path / "full").config.residual_mode == "full"
    trained = save_trained("llama")
    with pytest.raises(CheckpointError, match="--reinit-depth"):
        convert(trained, tmp_path / "other", layers_per_block=3, verify="none")
    report = convert(trained, tmp_path / "other", layers_per_block=3, reinit_depth=True, verify="full").report
    assert report["source_pseudo_queries"] == "set to zero" and report["top1_agreement"] == 1.0
    model = AttnResForCausalLM.from_pretrained(tmp_path / "other")
    assert model.config.layers_per_block == 3
    assert not any(score.query.any() for score in model.depth_mixer.children())
    convert(trained, tmp_path / "same", layers_per_block=2, verify="full")
    assert_same_tensors(tmp_path / "same", trained)


def test_standard_mode_is_converted_without_depth_tensors(save_plain, tmp_path):
    plain = save_plain()
    convert(plain, tmp_path / "standard", residual_mode="standard", verify="full")
    assert_same_tensors(tmp_path / "standard", plain)
    convert(tmp_path / "standard", tmp_path / "block", residual_mode="block", verify="full")
    assert AttnResForCausalLM.from_pretrained(tmp_path / "block").config.residual_mode == "block"


def test_quantised_shards_are_carried_over(save_plain, tmp_path):
    plain = save_plain()
    tensors = load_file(plain / "model.safetensors")
    packed = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            packed[name] = tensor.to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = torch.ones(1)
        else:
            packed[name] = tensor
    save_file(packed, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (plain / "config.json").write_text(json.dumps(config))
    convert(plain, tmp_path / "attnres", verify="none")
    written = json.loads((tmp_path / "attnres" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "fp8"
    assert "quantization_config" not in written["backbone_config"]
    first = bytes_of(plain)["model.safetensors"]
    assert bytes_of(tmp_path / "attnres")["model-00001-of-00002.safetensors"] == first


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "olmo2"}, "post-norm only"),
        ({"model_type": "inkling2"}, "different depth mechanism"),
        ({"model_type": "rwkv7", "attnres_block_size": 4}, "flash-linear-attention's 'rwkv7' is not supported"),
        ({"model_type": "gpt2"}, "not known to be PreNorm-additive"),
        ({"model_type": 3}, "model_type must be a string"),
        ({}, "model_type must be a string"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(config, reason, save_plain, tmp_path):
    plain = save_plain()
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason) as error:
        convert(plain, tmp_path / "attnres")
    assert "\n" not in str(error.value) and not (tmp_path / "attnres").exists()


def test_a_result_beyond_the_tolerance_does_not_appear(save_plain, tmp_path):
    # Hidden states so small that n^2 times the epsilon swamps them, where the norms do not allow for n.
    plain = save_plain(initializer_range=0.002, rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="does not compute what the source computes"):
        convert(plain, tmp_path / "attnres", residual_mode="full", verify="full", scale_norm_eps=False)
    assert not (tmp_path / "attnres").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


@pytest.mark.parametrize("mode", ["block", "full"])
def test_fresh_weights_of_usual_and_tiny_size_convert_to_the_same_function(mode, save_plain, tmp_path):
    for name, size in (("usual", 0.02), ("tiny", 0.002)):
        plain = save_plain(initializer_range=size, rms_norm_eps=1e-5)
        report = convert(plain, tmp_path / name, residual_mode=mode, verify="full", overwrite=True).report
        assert report["kind"] == "exact" and report["relative_logit_error"] < 2e-6 and report["top1_agreement"] == 1.0
        shutil.rmtree(plain)


def test_the_kimi_k3_layout_says_what_error_of_the_epsilon_is_accepted(save_plain, tmp_path):
    from attnres.conversion.verification import report_table

    report = convert(save_plain("kimi_linear"), tmp_path / "k3", to="kimi-k3", layers_per_block=3).report
    assert report["kind"] == "epsilon"
    table = report_table(report)
    assert "acts on the mean of n sources instead of their sum" in table
    assert f"relative logit error {report['relative_logit_error']:.1e} accepted" in table


def test_verification_layer_by_layer_from_disk_equals_that_in_memory(save_plain, tmp_path, monkeypatch):
    from attnres.conversion import verification

    plain = save_plain("qwen3_moe", shard="60KB")
    whole = convert(plain, tmp_path / "whole", verify="full").report
    monkeypatch.setattr(verification, "MEMORY_SHARE", 0.0)
    layers = convert(plain, tmp_path / "layers", verify="auto").report
    assert (whole.pop("in_memory"), layers.pop("in_memory")) == (True, False)
    assert layers.keys() == whole.keys()
    for name, value in whole.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-3, abs=1e-5)  # differences of logits that are nearly equal
        assert layers[name] == value, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers", "plain", "whole"]


def test_the_report_is_written_beside_the_weights(save_plain, tmp_path):
    outcome = convert(save_plain(), tmp_path / "attnres")
    assert json.loads((tmp_path / "attnres" / "conversion_report.json").read_text()) == outcome.report
    assert outcome.report["prompts"].startswith("random token ids")
    assert 0 < outcome.report["epsilon_effect"] < 1


def test_a_hub_snapshot_of_links_into_its_blobs_is_read(save_plain, tmp_path):
    plain = save_plain()
    repository = tmp_path / "models--somebody--llama"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in plain.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    convert(snapshot, tmp_path / "attnres", verify="none")
    assert not any(path.is_symlink() for path in (tmp_path / "attnres").iterdir())
    with safe_open(next((tmp_path / "attnres").glob("*.safetensors")), "pt"):
        pass


def test_block_counts_of_the_command_line_mean_decoder_layers(save_plain, tmp_path):
    convert(save_plain(), tmp_path / "attnres", num_blocks=3, verify="none")
    assert json.loads((tmp_path / "attnres" / "config.json").read_text())["layers_per_block"] == 2
