"""Compares what is written for engines with what their code looks for; tests/engines runs the engines."""

import json
from pathlib import Path

import pytest
import torch
from conversion.disk import assert_same_tensors
from families import tiny_config
from helpers import random_attnres, random_tokens, relative_error
from safetensors import safe_open
from safetensors.torch import load_file
from test_kimi_k3 import CASES, EVERYTHING, built, released_config
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.cli import main
from attnres.conversion import CheckpointError, convert
from attnres.conversion.engines import ENGINES

# Tensors that the weight loaders of vLLM 0.33.0, SGLang 0.5.23, mlx-lm 0.32.2 and llama.cpp 0c1e57098 look for, of one
# decoder layer and of the model; the same for all of them.
DEPTH = {f"{name}.weight" for kind in ("self_attention_res", "mlp_res") for name in (f"{kind}_proj", f"{kind}_norm")}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
KDA = {
    *(f"self_attn.{name}_{kind}.weight" for name in "qkv" for kind in ("proj", "conv1d")),
    *(f"self_attn.{name}.weight" for name in ("f_a_proj", "f_b_proj", "b_proj", "o_norm", "o_proj")),
    "self_attn.A_log",
    "self_attn.dt_bias",
}
LOW_RANK_GATE = {"self_attn.g_a_proj.weight", "self_attn.g_b_proj.weight"}
GATE = {"self_attn.g_proj.weight"}
MLA = {f"self_attn.{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")}
QUERIES = {"self_attn.q_proj.weight"}
LOW_RANK_QUERIES = {f"self_attn.{name}.weight" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")}
DENSE = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
SHARED = {f"block_sparse_moe.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
ROUTER = {"block_sparse_moe.gate.weight", "block_sparse_moe.gate.e_score_correction_bias"}
EXPERTS = {f"block_sparse_moe.experts.{expert}.{name}.weight" for expert in range(6) for name in ("w1", "w2", "w3")}
LATENT = {f"block_sparse_moe.routed_expert_{name}_proj.weight" for name in ("down", "up")}
LATENT_NORM = {"block_sparse_moe.routed_expert_norm.weight"}
MODEL = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.output_attn_res_proj.weight",
    "model.output_attn_res_norm.weight",
    "lm_head.weight",
}
WITH_FULL_RANK_GATE = ("llama.cpp",)
WITH_PREFIX = ("llama.cpp", "mlx")
ARCHITECTURES = {
    "llama.cpp": "KimiK3ForConditionalGeneration",
    "vllm": "KimiLinearForCausalLM",
    "sglang": "KimiK3LinearForCausalLM",
    "mlx": "KimiK3ForConditionalGeneration",
}
REFUSED = {
    ("llama.cpp", "every other layer sparse"): "it counts leading dense layers only",
    ("llama.cpp", "groups of experts"): "its graph chooses among all experts",
    ("llama.cpp", "groups of one expert"): "its graph chooses among all experts",
    ("llama.cpp", "softmax router"): "its converter asserts sigmoid",
    ("llama.cpp", "fewer heads in linear attention"): "it has one number of heads",
    ("mlx", "groups of experts"): "the score 0 instead of leaving them out",
    ("mlx", "groups of one expert"): "the score 0 instead of leaving them out",
    ("mlx", "softmax router"): "its configuration allows sigmoid only",
}


def looked_for(engine, options):
    """Returns the names of all tensors of a model of `released_config(**options)`."""
    config, names = released_config(**options), set(MODEL)
    full_rank = config["linear_attn_config"].get("use_full_rank_gate") or engine in WITH_FULL_RANK_GATE
    if config.get("tie_word_embeddings") and engine == "mlx":
        names.remove("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        of_layer = DEPTH | NORMS
        if layer + 1 in config["linear_attn_config"]["kda_layers"]:
            of_layer |= KDA | (GATE if full_rank else LOW_RANK_GATE)
        else:
            of_layer |= MLA | (LOW_RANK_QUERIES if config.get("q_lora_rank") else QUERIES)
            of_layer |= GATE if config.get("mla_use_output_gate") else set()
        sparse = config["num_experts"] is not None and layer >= 1 and layer % config.get("moe_layer_freq", 1) == 0
        of_layer |= ROUTER | EXPERTS if sparse else DENSE
        of_layer |= SHARED if sparse and config["num_shared_experts"] else set()
        of_layer |= LATENT if sparse and config.get("routed_expert_hidden_size") else set()
        of_layer |= LATENT_NORM if sparse and config.get("latent_moe_use_norm") else set()
        names |= {f"model.layers.{layer}.{name}" for name in of_layer}
    return {f"language_model.{name}" for name in names} if engine in WITH_PREFIX else names


def names_on_disk(folder):
    return {name for path in Path(folder).glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118


@torch.no_grad()
@pytest.mark.parametrize("feature", CASES)
def test_the_tensors_are_those_that_each_engine_looks_for_and_the_function_is_the_same(feature, tmp_path):
    options = dict(CASES[feature])
    linear = {"num_heads": 3} if feature != "fewer heads in linear attention" else {}
    options["linear_attn_config"] = {**linear, **options.get("linear_attn_config", {})}
    model, tokens = built(released_config(**options), 2), random_tokens(2, 11)
    expected, ours = model(tokens).logits, tmp_path / "ours"
    model.save_pretrained(ours)
    for engine in ENGINES:
        result = tmp_path / engine
        reason = REFUSED.get((engine, feature))
        if reason is not None:
            with pytest.raises(CheckpointError, match=f"^{engine} .* does not compute .*{reason}"):
                convert(ours, result, to="kimi-k3", engine=engine, verify="none")
            assert not result.exists()
            continue
        convert(ours, result, to="kimi-k3", engine=engine, verify="none")
        assert names_on_disk(result) == looked_for(engine, options)
        config = json.loads((result / "config.json").read_text())
        assert config["architectures"] == [ARCHITECTURES[engine]]
        text = config.get("text_config", config)
        assert ("text_config" in config) == (engine in WITH_PREFIX) and text["model_type"] == "kimi_linear"
        if engine in ("llama.cpp", "mlx"):
            assert text["hidden_act"] == "situ" and text["activation_situ_beta"] and text["activation_situ_linear_beta"]
        if engine != "mlx":
            assert text["tie_word_embeddings"] is False
        if engine == "sglang":
            assert_same_tensors(result, tmp_path / "vllm")
            continue
        convert(result, tmp_path / f"back-{engine}", verify="none")
        again = AttnResForCausalLM.from_pretrained(tmp_path / f"back-{engine}")
        assert relative_error(again(tokens).logits, expected) < 1e-4, engine


def test_the_command_line_prints_what_serves_the_result(tmp_path, capsys):
    options = {**EVERYTHING, "linear_attn_config": {**EVERYTHING["linear_attn_config"], "num_heads": 3}}
    built(released_config(**options), 2).save_pretrained(tmp_path / "ours")
    for name, engine in ENGINES.items():
        result = tmp_path / name
        command = ["convert", str(tmp_path / "ours"), str(result), "--to", "kimi-k3", "--for", name]
        assert main([*command, "--verify", "none"]) == 0
        printed = capsys.readouterr().out
        assert f"to serve it with {name} ({engine.version}):" in printed
        assert all(line.format(folder=result) in printed for line in engine.commands)


def test_an_engine_needs_the_layout_that_it_loads(tmp_path, capsys):
    random_attnres("llama").save_pretrained(tmp_path / "ours")
    for arguments, message in (
        (["--for", "llama.cpp"], "--for llama.cpp needs --to kimi-k3, got attnres"),
        (["--for", "mlx", "--to", "prenorm"], "--for mlx needs --to kimi-k3, got prenorm"),
        (["--for", "vllm", "--to", "kimi-k3"], "needs a kimi_linear or kimi_k3 backbone, got llama"),
    ):
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "result"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_for_vllm_depth_tensors_are_stored_as_they_are_in_memory(family, tmp_path):
    """vLLM's transformers backend renames tensors but does not stack them."""
    model = random_attnres(family)
    model.save_pretrained(tmp_path / "ours", max_shard_size="60KB")
    convert(tmp_path / "ours", tmp_path / "vllm", engine="vllm", verify="full")
    stored = {}
    for path in (tmp_path / "vllm").glob("*.safetensors"):
        stored |= load_file(path)
    in_memory = {name: tensor for name, tensor in model.state_dict().items() if "depth_mixer." in name}
    assert {name for name in stored if "depth" in name or "_res_" in name} == in_memory.keys()
    for name, tensor in in_memory.items():
        assert torch.equal(stored[name], tensor), name
    tokens = random_tokens(2, 9)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "vllm", attn_implementation="eager")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_for_vllm_plain_checkpoints_and_variants_get_stacked_depth_tensors(tmp_path):
    config = tiny_config("llama", num_hidden_layers=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "ours", depth_variant="static", verify="none")
    for source in ("plain", "ours"):
        result = tmp_path / f"{source}-vllm"
        convert(tmp_path / source, result, engine="vllm", depth_variant="static", verify="full")
        stacked = {"model.depth_mixer.attention_norm.query", "model.depth_mixer.variant_norm.weight"}
        assert stacked <= names_on_disk(result)


SERVED_BY_TRANSFORMERS = ["llama", "qwen3", "smollm3", "granite", "qwen3_moe", "mixtral", "deepseek_v3"]


@pytest.mark.parametrize("family", SERVED_BY_TRANSFORMERS)
def test_attention_can_be_an_engines_own(family):
    """Registers attention as vLLM does: no mask, one sequence, and its own object attached to the attention module."""
    used = []

    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None and module.is_causal and query.shape[0] == 1
        used.append(module.engine)
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2).reshape(query.shape[2], -1), None

    ALL_ATTENTION_FUNCTIONS.register("an engine", forward)
    try:
        expected = random_attnres(family)
        assert expected._supports_attention_backend
        config = AttnResConfig.from_dict(expected.config.to_dict())
        config.get_text_config()._attn_implementation = "an engine"
        model = AutoModel.from_config(config).eval()
        model.load_state_dict(expected.model.state_dict())
        for layer in model.layers:
            layer.self_attn.engine = layer.self_attn.layer_idx
        tokens = random_tokens(1, 13)
        output = model(tokens, use_cache=False, position_ids=torch.arange(13)[None], return_dict=False)
        wanted = expected.model(tokens).last_hidden_state
        # In float32: granite's factors amplify the different rounding of another attention function.
        assert relative_error(output[0], wanted) < 1e-4 and used == list(range(5))
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["an engine"]
