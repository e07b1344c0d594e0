"""Folders as Kimi K3 is released: root configuration, prefix, vision tensors, padded decay rates, MXFP4 experts."""

import json
import weakref

import kimi_k3_reference
import pytest
import torch
from conversion.disk import assert_same_tensors, tensors_of
from helpers import random_tokens, relative_error
from safetensors.torch import save_file
from test_kimi_k3 import EVERYTHING, FEATURES, PLAIN, built, released_config
from transformers.core_model_loading import revert_weight_conversion

from attnres import AttnResForCausalLM
from attnres.conversion import CheckpointError, convert
from attnres.conversion.inspection import inspect_checkpoint
from attnres.conversion.mxfp4 import dequantise

# Rows of whole groups of 32 columns, and prime numbers of rows where nothing asks for others.
SIZES = {"routed_expert_hidden_size": 32, "moe_intermediate_size": 64}
ALL = {**EVERYTHING, **SIZES}
FLOAT32 = ("A_log", "dt_bias", "conv1d.weight", "o_norm.weight", "e_score_correction_bias")
MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["re:.*self_attn.*"]}
CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def without_prefix(tensors):
    return {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}


def as_released(model):
    """Returns a model's tensors under the names and in the shapes and dtypes of a release, without prefix."""
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {
        name: tensor if name.endswith(FLOAT32) else tensor.to(torch.bfloat16) for name, tensor in tensors.items()
    }
    for name in [name for name in tensors if name.endswith("A_log")]:
        tensors[name] = torch.cat([tensors[name], torch.zeros(128 - len(tensors[name]))])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def pack(tensors, seed=0):
    """Puts random codes and scales in place of the experts; also returns their values, computed one by one."""
    generator = torch.Generator().manual_seed(seed)
    packed, unpacked = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            packed[name] = unpacked[name] = tensor
            continue
        rows, columns = tensor.shape
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (rows, columns // 32), generator=generator, dtype=torch.uint8)
        packed[name.replace(".weight", ".weight_packed")] = codes
        packed[name.replace(".weight", ".weight_scale")] = scales
        values = []
        for row_codes, row_scales in zip(codes.tolist(), scales.tolist(), strict=True):
            for column in range(columns):
                code = row_codes[column // 2] >> (4 * (column % 2)) & 15
                sign = -1 if code & 8 else 1
                values.append(sign * CODES[code & 7] * 2.0 ** (row_scales[column // 32] - 127))
        unpacked[name] = torch.tensor(values, dtype=torch.bfloat16).view(rows, columns)
    return packed, unpacked


def write_release(folder, tensors, text, shards=3, **root):
    """Writes a folder like a release, in several files that separate the tensors of pairs and layers."""
    folder.mkdir()
    unused = {"rope_theta": 10000.0, "rope_scaling": None, "head_dim": 74, "num_nextn_predict_layers": 0}
    text = {**unused, **text, "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear"}
    config = {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": text, **root}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tiktoken.model").write_text("vocabulary")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"vision_tower.patch_embed.weight": torch.ones(3), "mm_projector.proj.0.weight": torch.ones(2, 2)}
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def packed_and_unpacked():
    """Returns the tensors of a tiny release with every feature, as they are packed and what they stand for."""
    return pack(as_released(built(released_config(**ALL), 2)))


@pytest.fixture
def released(packed_and_unpacked, tmp_path):
    """Writes a tiny release with every feature; returns folder, text configuration and unpacked tensors."""
    packed, unpacked = packed_and_unpacked
    text = {**released_config(**ALL), "attn_res_block_size": 2, "dtype": "bfloat16", "quantization_config": MXFP4}
    return write_release(tmp_path / "released", packed, text), text, unpacked


def test_a_release_computes_what_the_oracle_computes(released, tmp_path):
    folder, text, unpacked = released
    outcome = convert(folder, tmp_path / "ours", verify="full")
    assert outcome.from_layout == "kimi-k3"
    assert outcome.left_out == ["mm_projector.proj.0.weight", "vision_tower.patch_embed.weight"]
    model = AttnResForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert model.config.backbone_config.model_type == "kimi_k3" and model.config.layers_per_block == 2
    tokens = random_tokens(2, 11)
    tensors = {name: tensor.double() for name, tensor in unpacked.items()}
    expected = torch.stack([kimi_k3_reference.logits(text, tensors, each) for each in tokens])
    assert relative_error(model(tokens).logits.double(), expected) < 1e-4
    stored = tensors_of(tmp_path / "ours")
    assert {stored[name].dtype for name in stored if ".experts." in name} == {torch.bfloat16}
    assert stored["model.layers.0.self_attn.A_log"].shape == (4,)
    assert (tmp_path / "ours" / "tiktoken.model").exists()


def test_unpacked_it_goes_back_to_the_released_layout_to_the_byte(released, tmp_path):
    folder, text, unpacked = released
    convert(folder, tmp_path / "ours", verify="none")
    AttnResForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "saved")
    for source in ("ours", "saved"):  # as it was converted, and as it is after loading and saving
        convert(tmp_path / source, tmp_path / f"{source}-k3", to="kimi-k3", verify="none")
        assert_same_tensors(without_prefix(tensors_of(tmp_path / f"{source}-k3")), unpacked)
    written = json.loads((tmp_path / "saved-k3" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("kimi_k3", ["KimiK3ForConditionalGeneration"])
    assert "quantization_config" not in written["text_config"]
    for key, value in text.items():
        if key not in ("quantization_config", "linear_attn_config"):
            assert written["text_config"][key] == value, key
    assert text["linear_attn_config"].items() <= written["text_config"]["linear_attn_config"].items()


def test_a_trained_model_goes_to_the_released_layout_and_back_to_the_byte(tmp_path):
    model = built(released_config(**ALL), 2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, losses = random_tokens(4, 16), []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained", max_shard_size="100KB")
    convert(tmp_path / "trained", tmp_path / "k3", to="kimi-k3", verify="full")
    convert(tmp_path / "k3", tmp_path / "back", verify="full")
    assert_same_tensors(tmp_path / "back", tmp_path / "trained")
    again = AttnResForCausalLM.from_pretrained(tmp_path / "back")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_packed_it_goes_there_and_back_to_the_byte(released, tmp_path):
    folder, _, unpacked = released
    outcome = convert(folder, tmp_path / "ours", keep_packed=True)
    assert outcome.report is None
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"] == MXFP4
    with pytest.raises(ValueError, match="has packed weights .*attnres convert SRC DST unpacks them"):
        AttnResForCausalLM.from_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="kimi-k3", keep_packed=True)
    originals = {name: each for name, each in tensors_of(folder).items() if name.startswith("language_model.")}
    assert_same_tensors(tmp_path / "back", originals)
    text = json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]
    assert text["quantization_config"] == MXFP4
    convert(tmp_path / "ours", tmp_path / "later", verify="full")  # unpacked after all
    convert(tmp_path / "later", tmp_path / "later-k3", to="kimi-k3", verify="none")
    assert_same_tensors(without_prefix(tensors_of(tmp_path / "later-k3")), unpacked)


def test_facts_of_a_packed_release_count_the_weights_that_it_stands_for(released):
    folder, _, unpacked = released
    facts = inspect_checkpoint(folder)
    padding = sum(128 - 4 for name in unpacked if name.endswith("A_log"))
    assert facts["parameters"] == sum(tensor.numel() for tensor in unpacked.values())
    assert padding and (facts["layout"], facts["family"], facts["blocks"]) == ("kimi-k3", "kimi_k3", 3)


def test_one_weight_at_a_time_is_dequantised(released, tmp_path, monkeypatch):
    """Memory holds one expert's matrix at a time."""
    alive = []

    def watched(packed, scale):
        assert not any(reference() is not None for reference in alive)
        weight = dequantise(packed, scale)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr("attnres.conversion.layouts.dequantise", watched)
    convert(released[0], tmp_path / "ours", verify="none")
    assert len(alive) == 4 * 6 * 3  # sparse layers, experts, matrices


def test_every_code_and_scale_is_the_number_that_it_stands_for():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = codes[0::2] | (codes[1::2] << 4)
    for byte in (0, 1, 100, 127, 128, 250):
        weight = dequantise(packed.unsqueeze(0), torch.tensor([[byte]], dtype=torch.uint8))
        wanted = torch.tensor([value * 2.0 ** (byte - 127) for value in (CODES + [-each for each in CODES]) * 2])
        assert torch.equal(weight.flatten(), wanted.to(torch.bfloat16)), byte


def test_packed_experts_are_found_by_their_tensors_whatever_the_configuration_says(released, tmp_path):
    folder, _, unpacked = released
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "ours", verify="none")
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    assert torch.equal(tensors_of(tmp_path / "ours")[name], unpacked[name])


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_comes_back_from_the_released_layout(feature, tmp_path):
    model = built(released_config(**FEATURES[feature]), 2)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "k3", to="kimi-k3", verify="none")
    convert(tmp_path / "k3", tmp_path / "back", verify="none")
    tokens = random_tokens(2, 11)
    again = AttnResForCausalLM.from_pretrained(tmp_path / "back")
    # Where transformers' own Kimi Linear computes the same, that is the backbone.
    assert relative_error(again(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nextn_predict_layers": 1}, "multi-token prediction .num_nextn_predict_layers=1"),
        ({"mla_use_nope": False}, "mla_use_nope must be true"),
        ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
        ({"quantization_config": {"format": "nvfp4-pack-quantized"}}, "'nvfp4-pack-quantized' is not read"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8' is not read"),
        ({"model_type": "kimi_k3_vision"}, "model_type 'kimi_k3_vision'; only kimi_linear is converted"),
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3'"),
    ],
    ids=lambda value: "",
)
def test_what_is_not_read_is_refused_by_its_name(change, message, released, tmp_path):
    folder, _, _ = released
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "ours", verify="none")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["model.layers.5.input_layernorm.weight", "mtp.0.norm.weight", "model.mtp.fc.weight"])
def test_layers_for_multi_token_prediction_are_refused_by_their_tensors(name, tmp_path):
    tensors = {**as_released(built(released_config(), 2)), name: torch.ones(44)}
    folder = write_release(tmp_path / "released", tensors, {**PLAIN, "attn_res_block_size": 2})
    with pytest.raises(CheckpointError, match=f"{name} belongs to a layer for multi-token prediction"):
        convert(folder, tmp_path / "ours", verify="none")


@pytest.mark.parametrize("damage", ["scale missing", "another dtype", "another group"])
def test_a_damaged_pair_is_refused_by_its_name(damage, packed_and_unpacked, tmp_path):
    packed = dict(packed_and_unpacked[0])
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight_packed"
    scale = name.replace("_packed", "_scale")
    if damage == "scale missing":
        del packed[scale]
    elif damage == "another dtype":
        packed[name] = packed[name].to(torch.int32)
    else:
        packed[scale] = packed[scale].repeat(1, 2)
    folder = write_release(tmp_path / "released", packed, {**released_config(**ALL), "attn_res_block_size": 2})
    with pytest.raises(CheckpointError, match="experts.3.w2"):
        convert(folder, tmp_path / "ours", verify="none")


def test_a_text_model_with_plain_residuals_is_read_as_such(tmp_path):
    tensors = as_released(built(released_config(**ALL), None))
    text = {**released_config(**ALL), "attn_res_block_size": None}
    convert(write_release(tmp_path / "released", tensors, text), tmp_path / "plain", verify="full")
    assert AttnResForCausalLM.from_pretrained(tmp_path / "plain").config.residual_mode == "standard"
