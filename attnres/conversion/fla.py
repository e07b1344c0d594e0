"""The layout of flash-linear-attention's models with Attention Residuals: configuration keys and tensor names."""

import re

from transformers import AutoConfig

from ..configuration_attnres import AttnResConfig
from .checkpoint import Checkpoint, CheckpointError

BLOCK_SIZE = "attnres_block_size"  # counts sublayers; 1 is full mode
MODEL_TYPE = "transformer"  # the only one of its models whose decoder layers are those of a supported family
QK_NORM_EPS = 1e-5  # independent of norm_eps

# Patterns of its tensor names, and our names.
RENAMINGS = (
    (r"^model\.embeddings\.", "model.embed_tokens."),
    (r"^model\.res_(proj|norm)\.", r"model.output_attn_res_\1."),
    (r"^(model\.layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
    (r"^(model\.layers\.\d+)\.mlp_norm\.", r"\1.post_attention_layernorm."),
    (r"^(model\.layers\.\d+)\.attn_res_(proj|norm)\.", r"\1.self_attention_res_\2."),
    (r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn."),
)


def read_config(checkpoint: Checkpoint) -> AttnResConfig:
    """Returns the AttnRes configuration of a checkpoint, with the backbone that computes the same."""
    folder, config = checkpoint.folder, checkpoint.config
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder}: flash-linear-attention's {config.get('model_type')!r} is not supported; of its models only "
            f"{MODEL_TYPE!r} can be converted."
        )
    gate = checkpoint.tensors.get("model.layers.0.mlp.gate_proj.weight")
    if gate is None:  # intermediate_size may be null, and its default is a formula
        raise CheckpointError(f"{folder}: lacks model.layers.0.mlp.gate_proj.weight.")
    if config.get("rope_theta", 10000.0) is None:
        raise CheckpointError(f"{folder}: rope_theta must be a number, got None.")
    hidden_size, heads = config.get("hidden_size", 2048), config.get("num_heads", 32)
    backbone = AutoConfig.for_model(
        **_family(checkpoint),
        vocab_size=config.get("vocab_size", 32000),
        hidden_size=hidden_size,
        head_dim=hidden_size // heads,
        intermediate_size=gate.shape[0],
        num_hidden_layers=config.get("num_hidden_layers", 24),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_kv_heads") or heads,
        hidden_act={"swish": "silu"}.get(config.get("hidden_act", "swish"), config.get("hidden_act")),
        max_position_embeddings=config.get("max_position_embeddings") or 2048,
        rope_theta=config.get("rope_theta", 10000.0),
        rms_norm_eps=config.get("norm_eps", 1e-6),
        initializer_range=config.get("initializer_range", 0.02),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        **{f"{token}_token_id": config.get(f"{token}_token_id") for token in ("pad", "bos", "eos")},
    )
    size = config[BLOCK_SIZE]
    if size is None:
        depth = {"residual_mode": "standard"}
    elif size == 1:
        depth = {"residual_mode": "full"}
    elif isinstance(size, int) and size > 1 and size % 2 == 0:  # a block longer than the model is a single block
        depth = {"layers_per_block": min(size // 2, backbone.num_hidden_layers)}
    else:
        raise CheckpointError(f"{folder}: {BLOCK_SIZE} must be 1 or an even number of sublayers, got {size!r}.")
    return AttnResConfig(backbone_config=backbone, dtype=backbone.dtype, **depth)


def _family(checkpoint: Checkpoint) -> dict:
    """Returns the model type whose attention computes the same, and that family's options for it."""
    folder, config = checkpoint.folder, checkpoint.config
    has_bias, has_norm, window = (config.get(key) for key in ("qkv_bias", "qk_norm", "window_size"))
    if has_norm and config.get("norm_eps", 1e-6) != QK_NORM_EPS:
        raise CheckpointError(
            f"{folder}: norm_eps must be {QK_NORM_EPS:g} with qk_norm, got {config.get('norm_eps', 1e-6)!r}: the norms "
            "of queries and keys have that epsilon, and in the qwen3 family all norms have the same."
        )
    families = [name for name, has in {"qwen2": has_bias, "qwen3": has_norm, "mistral": window}.items() if has]
    if len(families) > 1:
        raise CheckpointError(
            f"{folder}: no supported family has the attention of qkv_bias={bool(has_bias)}, qk_norm={bool(has_norm)}, "
            f"window_size={window!r}."
        )
    return {"model_type": families[0] if families else "llama", **({"sliding_window": window} if window else {})}


def own_name(name: str) -> str:
    """Returns our name of one of its tensors."""
    for pattern, ours in RENAMINGS:
        name = re.sub(pattern, ours, name)
    return name
