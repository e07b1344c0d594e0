"""Kimi K3's text model: outputs and gradients of each feature, and of all, against an oracle in float64."""

import kimi_k3_reference
import pytest
import torch
from families import tiny_config
from helpers import random_tokens, randomise_depth, relative_error
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.configuration_kimi_k3 import KimiK3Config

# As a released config.json says it: Kimi Linear's own choices, with one sparse and one dense layer of each attention.
PLAIN = {
    "vocab_size": 97,
    "hidden_size": 44,
    "intermediate_size": 52,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "mla_use_nope": True,
    "num_experts": 6,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 12,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "linear_attn_config": {
        "kda_layers": [1, 2, 4],
        "full_attn_layers": [3, 5],
        "num_heads": 4,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    },
}
FEATURES = {
    "kimi linear": {},
    "situ": {"hidden_act": "situ", "activation_situ_beta": 0.7, "activation_situ_linear_beta": 1.9},
    "situ with no bounds": {"hidden_act": "situ"},
    "latent experts": {"routed_expert_hidden_size": 28},
    "latent experts with a norm": {
        "routed_expert_hidden_size": 28,
        "latent_moe_use_norm": True,
        "routed_scaling_factor": 1.7,
    },
    "full-rank gate": {"linear_attn_config": {"use_full_rank_gate": True}},
    "lower bound of the decay": {"linear_attn_config": {"gate_lower_bound": -5.0}},
    "output gate": {"mla_use_output_gate": True},
    "rank of the queries": {"q_lora_rank": 20},
    "two shared experts": {"num_shared_experts": 2},
    "no shared expert": {"num_shared_experts": 0},
    "dense": {"num_experts": None, "num_experts_per_token": None, "moe_intermediate_size": None},
    "every other layer sparse": {"moe_layer_freq": 2},
    "groups of experts": {"num_expert_group": 3, "topk_group": 2, "routed_scaling_factor": 2.3},
    "groups of one expert": {"num_expert_group": 6, "topk_group": 3},
    "one expert per token": {"num_experts_per_token": 1},
    "weights as scored": {"moe_renormalize": False, "routed_scaling_factor": 0.6},
    "softmax router": {"moe_router_activation_func": "softmax"},
    "tied head": {"tie_word_embeddings": True},
    "fewer heads in linear attention": {"linear_attn_config": {"num_heads": 2, "head_dim": 12}},
    "longer convolution": {"linear_attn_config": {"short_conv_kernel_size": 5}},
}
EVERYTHING = {
    "hidden_act": "situ",
    "activation_situ_beta": 0.7,
    "activation_situ_linear_beta": 1.9,
    "routed_expert_hidden_size": 28,
    "latent_moe_use_norm": True,
    "routed_scaling_factor": 1.7,
    "linear_attn_config": {"use_full_rank_gate": True, "gate_lower_bound": -5.0},
    "mla_use_output_gate": True,
    "q_lora_rank": 20,
    "num_shared_experts": 2,
}
TOLERANCE = 1e-4  # float32
CASES = {**FEATURES, "everything": EVERYTHING}


def released_config(**options):
    linear = {**PLAIN["linear_attn_config"], **options.pop("linear_attn_config", {})}
    return {**PLAIN, **options, "linear_attn_config": linear}


def randomised(model, seed):
    """Draws all parameters, as a fault could hide behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("norm.weight", "layernorm.weight")):
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * noise)
            elif name.endswith(("A_log", "dt_bias")):
                tensor.copy_(0.5 * noise)
    return model


def built(released, block_size, seed=0):
    torch.manual_seed(seed)
    config = KimiK3Config(**released)
    if block_size is None:
        return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed).eval()
    config = AttnResConfig(backbone_config=config, layers_per_block=block_size, attn_implementation="eager")
    return randomise_depth(randomised(AttnResForCausalLM(config), seed), seed).eval()


def on_disk(model, tensors):
    return {name: tensor.double() for name, tensor in revert_weight_conversion(model, tensors).items()}


def run_oracle(given, tensors, tokens, cotangent, dtype):
    """Returns logits and gradients by name in float64; `dtype` is the oracle's."""
    tensors = {name: tensor.detach().to(dtype, copy=True).requires_grad_(True) for name, tensor in tensors.items()}
    logits = torch.stack([kimi_k3_reference.logits(given, tensors, each) for each in tokens])
    logits.backward(cotangent.to(dtype))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if tensor.grad is None}
    gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    return logits.detach().double(), {name: each.double() for name, each in {**gradients, **zeros}.items()}


# Plain residuals differ in the decoder layer only, which no feature changes.
ORACLE_CASES = [(feature, 2) for feature in CASES] + [("kimi linear", None), ("dense", None), ("everything", None)]


@pytest.mark.parametrize(("feature", "block_size"), ORACLE_CASES)
def test_output_and_gradients_are_those_of_the_oracle(feature, block_size):
    """The error may be ten times the rounding error of the oracle in float32."""
    released = released_config(**CASES[feature])
    given = {**released, "attn_res_block_size": block_size}
    model = built(released, block_size).train()
    tensors = on_disk(model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    if released.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    tokens = random_tokens(2, 13)
    cotangent = torch.randn(2, 13, 97)
    expected, wanted = run_oracle(given, tensors, tokens, cotangent, torch.float64)
    rounded, rounded_gradients = run_oracle(given, tensors, tokens, cotangent, torch.float32)

    logits = model(tokens).logits
    logits.backward(cotangent)
    assert relative_error(logits.double(), expected) < 10 * relative_error(rounded, expected) < 1e-3
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradients = on_disk(model, {name: parameter.grad for name, parameter in model.named_parameters()})
    for name in gradients.keys() & tensors.keys():
        rounding = (rounded_gradients[name] - wanted[name]).norm()
        error = (gradients[name] - wanted[name]).norm()
        assert error <= 10 * rounding + 1e-3 * wanted[name].norm(), name  # any fault is of order one


def test_the_plain_features_are_those_of_transformers_kimi_linear():
    """Without any feature of its own, the model computes what Kimi Linear computes from the same tensors."""
    kimi_linear = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("kimi_linear", **released_config(routed_scaling_factor=1.0)), attn_implementation="eager"
    )
    ours = built(released_config(), None)
    tensors = randomised(kimi_linear, 3).eval().state_dict()
    tensors = {name: each.flatten() if name.endswith("A_log") else each for name, each in tensors.items()}
    ours.load_state_dict(tensors)
    tokens = random_tokens(2, 17)
    assert torch.allclose(ours(tokens).logits, kimi_linear(tokens).logits, rtol=1e-5, atol=1e-5)


def test_names_on_disk_are_those_of_the_release():
    model = built(released_config(**EVERYTHING), 2)
    names = revert_weight_conversion(model, dict(model.state_dict()))
    of_layer = {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}
    depth = {f"{kind}.weight" for kind in ("self_attention_res_proj", "self_attention_res_norm")}
    depth |= {"mlp_res_proj.weight", "mlp_res_norm.weight"}
    assert of_layer == depth | {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{name}_{kind}.weight" for name in "qkv" for kind in ("proj", "conv1d")),
        *(f"self_attn.{name}.weight" for name in ("f_a_proj", "f_b_proj", "b_proj", "g_proj", "o_norm", "o_proj")),
        "self_attn.A_log",
        "self_attn.dt_bias",
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    of_layer = {name.removeprefix("model.layers.2.") for name in names if name.startswith("model.layers.2.")}
    experts = (f"experts.{expert}.{name}" for expert in range(6) for name in ("w1", "w2", "w3"))
    shared = (f"shared_experts.{name}_proj" for name in ("gate", "up", "down"))
    latent = (f"routed_expert_{name}" for name in ("down_proj", "norm", "up_proj"))
    attention = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
    assert of_layer == depth | {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{name}.weight" for name in (*attention, "g_proj", "o_proj")),
        *(f"block_sparse_moe.{name}.weight" for name in ("gate", *experts, *shared, *latent)),
        "block_sparse_moe.gate.e_score_correction_bias",
    }


def test_the_release_has_its_number_of_parameters_and_its_schedule():
    config = AttnResConfig.kimi_k3()
    backbone = config.backbone_config
    with torch.device("meta"):
        model = AttnResForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_779_484_393_568
    full = [layer for layer, kind in enumerate(backbone.layer_types) if kind == "full_attention"]
    assert full == [*range(3, 92, 4), 92] and len(full) == 24
    assert (config.layers_per_block, config.num_blocks) == (12, 8)
    assert AttnResConfig.kimi_k3(num_blocks=4).layers_per_block == 24


def test_a_released_configuration_has_the_official_defaults():
    config = KimiK3Config(linear_attn_config=PLAIN["linear_attn_config"], num_hidden_layers=5)
    assert (config.rms_norm_eps, config.routed_scaling_factor, config.num_shared_experts) == (1e-6, 1.0, 0)
    assert config.layer_types == ["linear_attention"] * 2 + ["full_attention", "linear_attention", "full_attention"]
    assert config.mlp_layer_types == ["dense"] * 5 and not config.mla_use_output_gate
    again = KimiK3Config.from_dict(KimiK3Config(**released_config(**EVERYTHING)).to_dict())
    assert again.to_dict() == KimiK3Config(**released_config(**EVERYTHING)).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_attn_config": {"gate_lower_bound": 0.5}}, "linear_gate_lower_bound must be at least -5 and below 0"),
        ({"linear_attn_config": {"gate_lower_bound": -6.0}}, "linear_gate_lower_bound .* got -6.0"),
        ({"moe_router_activation_func": "relu"}, "moe_router_activation_func must be one of sigmoid, softmax"),
        ({"num_experts_per_token": None}, "num_experts_per_tok must be a positive number"),
        ({"mla_use_nope": False}, "mla_use_nope must be true"),
        ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
        ({"num_expert_group": 4}, "n_group must divide num_local_experts=6"),
    ],
)
def test_what_makes_no_model_is_refused_by_its_field(options, message):
    with pytest.raises(ValueError, match=message):
        KimiK3Config(**released_config(**options))


@pytest.mark.parametrize("lengths", [(13,), (5, 8), (1, 1, 7, 4), (6, 1, 1, 1, 4)])
def test_with_a_cache_in_chunks_it_computes_what_it_computes_at_once(lengths):
    model = built(released_config(**EVERYTHING), 2)
    tokens = random_tokens(2, 13)
    expected = model(tokens, use_cache=False).logits
    cache, parts, start = None, [], 0
    for length in lengths:
        output = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + length
        parts.append(output.logits)
    assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_on_the_left_changes_nothing(use_cache):
    model = built(released_config(**EVERYTHING), 2)
    tokens = random_tokens(1, 11)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 11, dtype=torch.long)], dim=1)
    output = model(padded, attention_mask=mask, use_cache=use_cache).logits[:, 4:]
    assert relative_error(output, model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_computes_the_same(implementation):
    model = AttnResForCausalLM(
        AttnResConfig(backbone_config=tiny_config("kimi_k3", num_hidden_layers=4, layer_types=None))
    )
    tokens = random_tokens(2, 9)
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    model.set_experts_implementation(implementation)
    assert relative_error(model(tokens).logits, expected) < 1e-5


def test_bfloat16_keeps_what_the_release_has_in_float32(tmp_path):
    model = built(released_config(**EVERYTHING), 2)
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.set_experts_implementation("eager")  # the others want sizes that are multiples of 8
    wide = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    kinds = ("A_log", "dt_bias", "conv1d.weight", "o_norm.weight", "e_score_correction_bias")
    assert wide == {name for name in loaded.state_dict() if name.endswith(kinds)}
    tokens = random_tokens(2, 9)
    assert relative_error(loaded(tokens).logits.float(), model(tokens).logits) < 0.3


def test_it_learns():
    """The mixture of experts can be trained, unlike that of the official code."""
    model = built(released_config(**EVERYTHING), 2).train()
    tokens = random_tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
