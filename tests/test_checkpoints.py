"""Saving, loading and converting in memory: names on disk, sharding, faults, remote code."""

import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, tiny_config
from helpers import random_attnres, short_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel

# Twelve layers, because their order on disk is numeric only from ten on; the attention that loading chooses too.
deep_attnres = partial(random_attnres, layers=12, attn_implementation=None)
INPUT_IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 23], [29, 31, 37, 41, 43, 47, 53]])


def names_on_disk(folder):
    return {name for file in Path(folder).glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118


def depth_names(layers):
    per_layer = [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(layers)
        for name in ("self_attention_res_proj", "self_attention_res_norm", "mlp_res_proj", "mlp_res_norm")
    ]
    return {*per_layer, "model.output_attn_res_proj.weight", "model.output_attn_res_norm.weight"}


@pytest.fixture
def plain_folder(tmp_path):
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", num_hidden_layers=4))
    plain.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_tensors(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keep_every_bit_and_the_family_names_on_disk(family, tmp_path):
    model = random_attnres(family, attn_implementation=None)
    AutoModelForCausalLM.from_config(model.config.backbone_config).save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = model(INPUT_IDS).logits
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        assert names_on_disk(tmp_path / folder) == names_on_disk(tmp_path / "plain") | depth_names(5)
        loaded = AttnResForCausalLM.from_pretrained(tmp_path / folder)
        assert_same_tensors(loaded, model)
        with torch.no_grad():  # how a weight lies in memory can change a matrix product's last bit, as in any model
            torch.testing.assert_close(loaded(INPUT_IDS).logits, expected, rtol=1e-3, atol=1e-3)
        loaded.save_pretrained(tmp_path / "again")
        assert names_on_disk(tmp_path / "again") == names_on_disk(tmp_path / folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_folder_loads_as_the_lossless_start_and_keeps_its_names_when_saved(family, tmp_path):
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(short_config(family)).eval()
    plain.save_pretrained(tmp_path / "plain")
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "plain", layers_per_block=2)
    from_path = AttnResForCausalLM.from_backbone(str(tmp_path / "plain"), layers_per_block=2)
    in_memory = AttnResForCausalLM.from_backbone(plain, layers_per_block=2)
    assert loaded.config.layers_per_block == 2
    with torch.no_grad():
        logits = loaded(INPUT_IDS).logits
        assert_same_tensors(loaded, from_path)
        assert_same_tensors(loaded, in_memory)
        torch.testing.assert_close(logits, plain(INPUT_IDS).logits, rtol=1e-4, atol=1e-3)
    loaded.save_pretrained(tmp_path / "attnres")
    assert names_on_disk(tmp_path / "attnres") == names_on_disk(tmp_path / "plain") | depth_names(5)


def test_depth_tensors_on_disk_have_the_published_shapes_and_follow_the_layers(tmp_path):
    model = deep_attnres("llama", layers_per_block=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mixer = model.depth_mixer
    for layer in (0, 2, 10, 11):  # 10 comes after 2 only in numeric order
        prefix = f"model.layers.{layer}"
        assert torch.equal(tensors[f"{prefix}.self_attention_res_proj.weight"], mixer.attention_norm.query[layer])
        assert torch.equal(tensors[f"{prefix}.self_attention_res_norm.weight"], mixer.attention_norm.weight[layer])
        assert torch.equal(tensors[f"{prefix}.mlp_res_proj.weight"], mixer.mlp_norm.query[layer])
        assert torch.equal(tensors[f"{prefix}.mlp_res_norm.weight"], mixer.mlp_norm.weight[layer])
        assert tensors[f"{prefix}.mlp_res_proj.weight"].shape == (1, 40)
    assert torch.equal(tensors["model.output_attn_res_proj.weight"], mixer.output_norm.query)
    assert torch.equal(tensors["model.output_attn_res_norm.weight"], mixer.output_norm.weight)


def test_two_families_in_one_process_save_and_load_in_any_order(tmp_path):
    moe = deep_attnres("mixtral", layers_per_block=4)
    hybrid = deep_attnres("kimi_linear", layers_per_block=4)
    moe.save_pretrained(tmp_path / "moe")  # the registry now holds the other family's converters
    hybrid.save_pretrained(tmp_path / "hybrid")
    assert any("block_sparse_moe.experts.0.w1" in name for name in names_on_disk(tmp_path / "moe"))
    assert any("self_attn.q_conv1d" in name for name in names_on_disk(tmp_path / "hybrid"))
    for model, folder in ((moe, "moe"), (hybrid, "hybrid"), (moe, "moe")):
        loaded = AttnResForCausalLM.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_the_model_without_a_head_loads_from_a_checkpoint_with_one_and_with_a_new_head_the_other_way_round(tmp_path):
    model = deep_attnres("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "lm")
    base = AttnResModel.from_pretrained(tmp_path / "lm")
    with torch.no_grad():
        assert torch.equal(base(INPUT_IDS).last_hidden_state, model.model(INPUT_IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    reloaded = AttnResModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(base(INPUT_IDS).last_hidden_state, reloaded(INPUT_IDS).last_hidden_state)
    again = AttnResForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"), r"missing model\.layers\.1\.self_attn"),
        (lambda tensors: tensors.pop("model.layers.3.mlp.gate.weight"), r"missing model\.layers\.3\.mlp\.gate"),
        (lambda tensors: tensors.update({"model.surplus.weight": torch.ones(3)}), r"unexpected model\.surplus\.weight"),
        (
            lambda tensors: tensors.update({"model.output_attn_res_norm.weight": torch.ones(40)}),
            "missing .*depth_mixer",
        ),
    ],
    ids=["missing", "missing-router", "extra", "part-of-the-depth-tensors"],
)
def test_a_checkpoint_with_missing_or_extra_tensors_is_an_error(plain_folder, change, message):
    edit_tensors(plain_folder, change)
    with pytest.raises(ValueError, match=message) as error:
        AttnResForCausalLM.from_pretrained(plain_folder)
    assert "\n" not in str(error.value)
    AttnResForCausalLM.from_pretrained(plain_folder, strict=False)


def test_a_checkpoint_with_a_misshapen_tensor_is_an_error(plain_folder):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(41)

    edit_tensors(plain_folder, change)
    with pytest.raises(ValueError, match=r"misshapen model\.norm\.weight \[41\] instead of \[40\]"):
        AttnResForCausalLM.from_pretrained(plain_folder)
    AttnResForCausalLM.from_pretrained(plain_folder, ignore_mismatched_sizes=True)


def test_a_missing_expert_is_an_error(plain_folder):
    edit_tensors(plain_folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.4.up_proj.weight"))
    with pytest.raises((ValueError, RuntimeError)):
        AttnResForCausalLM.from_pretrained(plain_folder)


def test_a_pickle_checkpoint_is_not_opened(plain_folder):
    torch.save(load_file(plain_folder / "model.safetensors"), plain_folder / "pytorch_model.bin")
    (plain_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AttnResForCausalLM.from_pretrained(plain_folder)


def test_depth_tensors_are_not_dropped_silently_by_the_standard_mode(tmp_path):
    deep_attnres("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected .*res_norm.*|unexpected .*depth_mixer"):
        AttnResForCausalLM.from_pretrained(tmp_path, residual_mode="standard")


def test_depth_options_given_to_from_pretrained_replace_the_stored_ones_while_queries_are_zero(tmp_path):
    config = AttnResConfig(backbone_config=tiny_config("llama"), layers_per_block=3)
    AttnResForCausalLM(config).save_pretrained(tmp_path)
    assert AttnResForCausalLM.from_pretrained(tmp_path).config.layers_per_block == 3
    assert AttnResForCausalLM.from_pretrained(tmp_path, num_blocks=2).config.layers_per_block == 6
    assert AttnResForCausalLM.from_pretrained(tmp_path, residual_mode="full").config.residual_mode == "full"
    with pytest.raises(ValueError, match="layers_per_block must be between 1 and num_hidden_layers=12, got 13"):
        AttnResForCausalLM.from_pretrained(tmp_path, layers_per_block=13)


@pytest.mark.parametrize("options", [{"num_blocks": 2}, {"layers_per_block": 4}, {"residual_mode": "full"}])
def test_trained_queries_do_not_load_with_other_depth_options(options, tmp_path):
    deep_attnres("llama", layers_per_block=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained for residual_mode=block, layers_per_block=3"):
        AttnResForCausalLM.from_pretrained(tmp_path, **options)
    AttnResForCausalLM.from_pretrained(tmp_path, **options, strict=False)
    assert AttnResForCausalLM.from_pretrained(tmp_path, num_blocks=4).config.layers_per_block == 3


def test_threads_that_load_different_families_do_not_mix_their_converters(tmp_path):
    families = ("qwen3_moe", "mixtral", "kimi_linear")
    for family in families:
        random_attnres(family).save_pretrained(tmp_path / family)
    with ThreadPoolExecutor(len(families)) as pool:
        loaded = list(pool.map(AttnResForCausalLM.from_pretrained, [tmp_path / family for family in families * 3]))
    assert [model.config.backbone_config.model_type for model in loaded] == list(families * 3)


def test_the_code_that_a_plain_checkpoint_names_is_not_taken_over(tmp_path):
    config = tiny_config("llama")
    config.auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    plain["auto_map"] = config.auto_map
    (tmp_path / "plain" / "config.json").write_text(json.dumps(plain))
    AttnResForCausalLM.from_backbone(tmp_path / "plain").save_pretrained(tmp_path / "attnres")
    stored = json.loads((tmp_path / "attnres" / "config.json").read_text())
    assert "auto_map" not in stored["backbone_config"]
    assert stored["auto_map"]["AutoConfig"] == "configuration_attnres.AttnResConfig"


def test_from_backbone_copies_the_model_and_leaves_it_alone():
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(tiny_config("qwen3"), attn_implementation="eager")
    plain.generation_config.temperature = 0.5
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = AttnResForCausalLM.from_backbone(plain.to(torch.bfloat16), num_blocks=4)
    assert model.dtype == torch.bfloat16 and model.depth_mixer.mlp_norm.query.dtype == torch.bfloat16
    assert model.config._attn_implementation == model.config.backbone_config._attn_implementation == "eager"
    assert model.generation_config.temperature == 0.5 and model.training == plain.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name].to(torch.bfloat16)), name


def test_from_backbone_refuses_what_is_an_attnres_model_already(tmp_path):
    model = deep_attnres("llama")
    with pytest.raises(ValueError, match="AttnResConfig"):
        AttnResForCausalLM.from_backbone(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained"):
        AttnResForCausalLM.from_backbone(tmp_path)


def test_from_backbone_says_what_to_do_with_a_peft_model():
    adapted = SimpleNamespace(merge_and_unload=None)  # what a PEFT model has and no other
    with pytest.raises(ValueError, match="merge_and_unload"):
        AttnResForCausalLM.from_backbone(adapted)


def test_auto_classes_know_the_model(tmp_path):
    model = deep_attnres("llama")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is AttnResConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is AttnResModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is AttnResForCausalLM
    assert type(AutoModelForCausalLM.from_config(model.config)) is AttnResForCausalLM


REMOTE = """
    import sys
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    try:
        import attnres
        sys.exit("attnres is importable: the test proves nothing")
    except ImportError:
        pass
    for folder in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        expected = torch.load(folder + "/logits.pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).layers_per_block == 2
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "AttnResModel"
        model.generate(expected["input_ids"], max_new_tokens=3, do_sample=False)
        model.save_pretrained(folder + "-again")
        AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
"""


def test_saved_folders_load_as_remote_code_where_the_package_is_not_installed(tmp_path):
    families = ("qwen3_moe", "kimi_linear", "kimi_k3")
    for family in families:
        model = random_attnres(family, attn_implementation=None)
        model.save_pretrained(tmp_path / family)
        auto_map = json.loads((tmp_path / family / "config.json").read_text())["auto_map"]
        tasks = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
        assert set(auto_map) == {"AutoConfig", "AutoModel", *(f"AutoModelFor{task}" for task in tasks)}
        model.set_depth_implementation("eager")  # the kernels come with the package
        with torch.no_grad():
            torch.save({"input_ids": INPUT_IDS, "logits": model(INPUT_IDS).logits}, tmp_path / family / "logits.pt")
    # -I: neither PYTHONPATH nor the current directory; an installed (editable) package is blocked by an import hook.
    block = "import sys; sys.modules['attnres'] = None\n"
    script = tmp_path / "remote.py"
    script.write_text(block + textwrap.dedent(REMOTE))
    result = subprocess.run(
        [sys.executable, "-I", script, *(tmp_path / family for family in families)],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
