"""The configuration: defaults, depth options, delegation to the backbone, serialisation, refusals."""

import copy
import json
from math import ceil

import pytest
import torch
from families import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from attnres import AttnResConfig, AttnResForCausalLM


def test_the_default_is_the_papers_kimi_linear_with_three_layers_per_block():
    config = AttnResConfig()
    backbone = config.backbone_config
    assert backbone.model_type == "kimi_linear"
    assert (config.residual_mode, config.layers_per_block, config.num_blocks) == ("block", 3, 9)
    full_attention = [layer for layer, kind in enumerate(backbone.layer_types, 1) if kind == "full_attention"]
    assert full_attention == [4, 8, 12, 16, 20, 24, 27]
    assert backbone.mlp_layer_types == ["dense"] + ["sparse"] * 26


def test_the_default_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = AttnResForCausalLM(AttnResConfig())
    config = model.config.backbone_config
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - experts + experts * config.num_experts_per_tok // config.num_local_experts
    assert round(total / 1e9, 1) == 49.1
    assert round(active / 1e9, 1) == 3.5
    assert sum(parameter.numel() for parameter in model.depth_parameters()) == 2 * 2304 * (2 * 27 + 1)


@pytest.mark.parametrize(
    ("layers", "options", "layers_per_block", "num_blocks"),
    [
        (12, {}, 2, 6),  # 8 blocks asked for: 12 layers make 6 of 2
        (16, {}, 2, 8),
        (5, {}, 1, 5),
        (12, {"num_blocks": 5}, 3, 4),
        (12, {"num_blocks": 1}, 12, 1),
        (12, {"layers_per_block": 5}, 5, 3),
        (12, {"layers_per_block": 3, "num_blocks": 4}, 3, 4),
    ],
)
def test_blocks_are_counted_in_decoder_layers(layers, options, layers_per_block, num_blocks):
    config = AttnResConfig(backbone_config=tiny_config("llama", num_hidden_layers=layers), **options)
    assert (config.layers_per_block, config.num_blocks) == (layers_per_block, num_blocks)


@given(layers=st.integers(1, 200), num_blocks=st.integers(1, 200))
def test_num_blocks_is_turned_into_layers_per_block_or_refused(layers, num_blocks):
    backbone = LlamaConfig(num_hidden_layers=layers)
    if num_blocks > layers:
        with pytest.raises(ValueError, match=f"num_hidden_layers={layers}, got {num_blocks}"):
            AttnResConfig(backbone_config=backbone, num_blocks=num_blocks)
    else:
        config = AttnResConfig(backbone_config=backbone, num_blocks=num_blocks)
        assert config.layers_per_block == ceil(layers / num_blocks)
        assert config.num_blocks <= num_blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_per_block": 0}, "layers_per_block must be between 1 and num_hidden_layers=12, got 0.*S=6"),
        ({"layers_per_block": 13}, "got 13"),
        ({"num_blocks": 0}, "num_blocks must be a whole number between 1 and num_hidden_layers=12, got 0"),
        ({"num_blocks": 2.5}, "got 2.5"),
        ({"layers_per_block": 5, "num_blocks": 6}, "layers_per_block=5 and num_blocks=6 disagree"),
        ({"residual_mode": "blocks"}, "residual_mode must be one of block, full, standard, got 'blocks'"),
        ({"depth_implementation": "magic"}, "depth_implementation must be one of .*eager.*, got 'magic'"),
    ],
)
def test_a_depth_option_out_of_range_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        AttnResConfig(backbone_config=tiny_config("llama"), **options)
    assert "\n" not in str(error.value)


def test_an_option_set_to_nonsense_later_is_refused_when_the_model_is_built():
    config = AttnResConfig(backbone_config=tiny_config("llama"))
    config.layers_per_block = 99
    with pytest.raises(ValueError, match="got 99"):
        AttnResForCausalLM(config)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("olmo2", "post-norm only"),
        ("olmo3", "mean of sources"),
        ("gemma3", "gemma3_text"),
        ("gpt2", "not known to be PreNorm-additive"),
    ],
)
def test_a_family_that_cannot_be_converted_is_refused_with_the_reason(model_type, reason):
    for backbone in ({"model_type": model_type}, AutoConfig.for_model(model_type)):
        with pytest.raises(ValueError, match=reason) as error:
            AttnResConfig(backbone_config=backbone)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", [{"hidden_size": 8}, "llama", 3])
def test_a_backbone_that_is_no_configuration_is_refused(backbone):
    with pytest.raises((ValueError, TypeError), match="backbone_config"):
        AttnResConfig(backbone_config=backbone)


def test_attributes_of_the_backbone_are_read_and_written_through():
    config = AttnResConfig(backbone_config=tiny_config("llama"))
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (40, 97, 256)
    config.vocab_size, config.pad_token_id, config.use_cache = 101, 5, False
    backbone = config.backbone_config
    assert (backbone.vocab_size, backbone.pad_token_id, backbone.use_cache) == (101, 5, False)
    assert "vocab_size" not in vars(config)
    assert config.get_text_config() is backbone and config.get_text_config(decoder=True) is backbone
    with pytest.raises(AttributeError, match="no_such_thing"):
        config.no_such_thing  # noqa: B018


def test_num_labels_and_output_attentions_stay_on_the_root():
    config = AttnResConfig(backbone_config=tiny_config("llama"), attn_implementation="eager")
    config.num_labels = 3
    config.output_attentions = True
    assert len(config.id2label) == 3 and len(config.backbone_config.id2label) == 2
    assert config.output_attentions and not config.backbone_config.output_attentions


def test_the_attention_implementation_reaches_the_backbone_from_either_side():
    backbone = tiny_config("llama")
    backbone._attn_implementation = "eager"
    config = AttnResConfig(backbone_config=backbone)
    assert config._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    assert backbone._attn_implementation == "sdpa"


def test_a_saved_configuration_comes_back_equal_and_without_a_local_path(tmp_path):
    backbone = tiny_config("qwen3_moe")
    backbone.name_or_path = "/home/somebody/secret-model"
    config = AttnResConfig(backbone_config=backbone, layers_per_block=5, depth_implementation="eager")
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "secret-model" not in text and "depth_implementation" not in text
    stored = json.loads(text)
    assert (stored["model_type"], stored["layers_per_block"], stored["residual_mode"]) == ("attnres", 5, "block")
    assert "num_blocks" not in stored
    loaded = AttnResConfig.from_pretrained(tmp_path)
    assert type(loaded.backbone_config) is type(backbone)
    loaded.save_pretrained(tmp_path / "again")
    again, first = (json.loads((tmp_path / name).read_text()) for name in ("again/config.json", "config.json"))
    assert again == first
    assert copy.deepcopy(loaded).to_dict() == loaded.to_dict()


def test_the_configuration_of_a_plain_checkpoint_becomes_that_of_its_conversion(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    config = AttnResConfig.from_pretrained(tmp_path, num_blocks=4)
    assert (config.backbone_config.model_type, config.layers_per_block) == ("qwen3", 3)
    same = AttnResConfig.from_backbone(AutoConfig.from_pretrained(tmp_path), num_blocks=4)
    assert same.to_dict()["backbone_config"]["hidden_size"] == 40 and same.layers_per_block == 3


def test_a_configuration_file_without_a_backbone_is_not_the_default_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "attnres"}')
    with pytest.raises(ValueError, match="backbone_config is missing"):
        AttnResConfig.from_pretrained(tmp_path)


def test_from_backbone_copies_the_configuration_and_knows_its_options():
    backbone = tiny_config("llama")
    config = AttnResConfig.from_backbone(backbone, residual_mode="full")
    config.vocab_size = 3
    assert backbone.vocab_size == 97
    with pytest.raises(ValueError, match="'layer_per_block'; known: residual_mode, layers_per_block, num_blocks"):
        AttnResConfig.from_backbone(backbone, layer_per_block=3)
