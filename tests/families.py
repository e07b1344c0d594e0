"""Tiny configurations of every supported family: 12 decoder layers, uneven sizes (grouped experts on CPU need
multiples of 4)."""

from transformers import AutoConfig

import attnres  # noqa: F401 (registers the families of its own)

COMMON = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 10,
    "head_dim": 6,
}
GROUPED = {"n_group": 1, "topk_group": 1, "n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 6}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR = {
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
}

FAMILY_OPTIONS = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, **WINDOWS},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 3},
    "phi3": {"resid_pdrop": 0.0, "original_max_position_embeddings": 256},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 2},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, **WINDOWS},
    "deepseek_v2": {**MLA, **GROUPED, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "deepseek_v3": {**MLA, **GROUPED, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "glm4_moe": {**GROUPED, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_intermediate_size": 12,
        "moe_layer_start_index": 1,
        "use_bias": True,
    },
    "minimax_m2": {"num_local_experts": 5, "num_experts_per_tok": 2, "rotary_dim": 4},
    "qwen3_next": {
        **EXPERTS,
        **LINEAR,
        "shared_expert_intermediate_size": 20,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "kimi_linear": {
        **{**MLA, "q_lora_rank": None},
        **LINEAR,
        "num_key_value_heads": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kimi_k3": {
        **MLA,
        **LINEAR,
        "hidden_act": "situ",
        "activation_situ_beta": 1.7,
        "activation_situ_linear_beta": 2.3,
        "mla_use_output_gate": True,
        "num_key_value_heads": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "n_shared_experts": 2,
        "routed_expert_hidden_size": 28,
        "latent_moe_use_norm": True,
        "first_k_dense_replace": 1,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "linear_use_full_rank_gate": True,
        "linear_gate_lower_bound": -5.0,
    },
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoe": {
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "gemma2": {**WINDOWS, "query_pre_attn_scalar": 10},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 10},
}
FAMILIES = tuple(FAMILY_OPTIONS)
MOE_FAMILIES = tuple(name for name, options in FAMILY_OPTIONS.items() if any("experts" in key for key in options))
LINEAR_FAMILIES = ("qwen3_next", "kimi_linear", "kimi_k3")


def tiny_config(family: str, **overrides):
    """Configuration of a tiny model of one family, with hidden states of order one."""
    return AutoConfig.for_model(family, **{**COMMON, **FAMILY_OPTIONS[family], **overrides})
