"""Checkpoints of flash-linear-attention's models with Attention Residuals: configuration keys and tensor names."""

import re

from transformers import AutoConfig

from ..configuration_attnres import AttnResConfig
from .checkpoint import Checkpoint, CheckpointError

BLOCK_SIZE = "attnres_block_size"  # counts sublayers; 1 is full mode
MODEL_TYPE = "transformer"  # the one of its models whose layers are those of a family
QK_NORM_EPS = 1e-5  # whatever norm_eps is

# Names in its decoder layers and outside of them, and ours.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn_res_proj": "self_attention_res_proj",
    "attn_res_norm": "self_attention_res_norm",
    "attn": "self_attn",
}
MODEL_NAMES = {
    "model.embeddings.": "model.embed_tokens.",
    "model.res_proj.": "model.output_attn_res_proj.",
    "model.res_norm.": "model.output_attn_res_norm.",
}


def is_fla(config: dict) -> bool:
    """Whether a `config.json` is of one of its models that may have Attention Residuals."""
    return BLOCK_SIZE in config


def read_config(checkpoint: Checkpoint) -> AttnResConfig:
    """Its configuration, as an AttnRes one with the backbone that computes the same.

    Raises:
        CheckpointError: a model that is of none of the families, by its name or key.
    """
    folder, config = checkpoint.folder, checkpoint.config
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder}: flash-linear-attention's {config.get('model_type')!r} is none of the families; of its models "
            f"only {MODEL_TYPE!r} is read."
        )
    gate = checkpoint.tensors.get("model.layers.0.mlp.gate_proj.weight")
    if gate is None:  # the key may be null, and its default is a formula
        raise CheckpointError(f"{folder}: lacks model.layers.0.mlp.gate_proj.weight.")
    heads = config.get("num_heads", 32)
    norm_eps = config.get("norm_eps", 1e-6)
    common = {
        "vocab_size": config.get("vocab_size", 32000),
        "hidden_size": config.get("hidden_size", 2048),
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": config.get("num_hidden_layers", 24),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_kv_heads") or heads,
        "hidden_act": {"swish": "silu"}.get(config.get("hidden_act", "swish"), config.get("hidden_act")),
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
        "rope_theta": config.get("rope_theta", 10000.0),
        "rms_norm_eps": norm_eps,
        "initializer_range": config.get("initializer_range", 0.02),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        **{f"{token}_token_id": config.get(f"{token}_token_id") for token in ("pad", "bos", "eos")},
        "dtype": config.get("dtype") or config.get("torch_dtype"),
    }
    if common["rope_theta"] is None:
        raise CheckpointError(f"{folder}: rope_theta must be a number, got None.")
    common["head_dim"] = common["hidden_size"] // heads
    backbone = AutoConfig.for_model(**_family(folder, config, norm_eps), **common)
    size = config[BLOCK_SIZE]
    if size is None:
        depth = {"residual_mode": "standard"}
    elif size == 1:
        depth = {"residual_mode": "full"}
    elif isinstance(size, int) and size > 1 and size % 2 == 0:
        # One that is longer than the model is a single block to it.
        depth = {"layers_per_block": min(size // 2, backbone.num_hidden_layers)}
    else:
        raise CheckpointError(f"{folder}: {BLOCK_SIZE} must be 1 or an even number of sublayers, got {size!r}.")
    return AttnResConfig(backbone_config=backbone, dtype=backbone.dtype, **depth)


def _family(folder, config: dict, norm_eps: float) -> dict:
    """The model type, and the options of that family, whose attention computes the same."""
    has_bias, has_norm, window = (bool(config.get(key)) for key in ("qkv_bias", "qk_norm", "window_size"))
    if has_norm and norm_eps != QK_NORM_EPS:
        raise CheckpointError(
            f"{folder}: qk_norm has an epsilon of {QK_NORM_EPS:g} there, that of all norms in the qwen3 family; "
            f"norm_eps must be that too, got {norm_eps!r}."
        )
    families = {
        (False, False, False): {"model_type": "llama"},
        (True, False, False): {"model_type": "qwen2"},
        (False, True, False): {"model_type": "qwen3"},
        (False, False, True): {"model_type": "mistral", "sliding_window": config.get("window_size")},
    }
    found = families.get((has_bias, has_norm, window))
    if found is None:
        raise CheckpointError(
            f"{folder}: no family has the attention of qkv_bias={has_bias}, qk_norm={has_norm}, "
            f"window_size={config.get('window_size')!r}."
        )
    return found


def own_names(names: list[str]) -> dict[str, str]:
    """Our names of its tensors, and its own."""
    return {_own_name(name): name for name in names}


def _own_name(name: str) -> str:
    for prefix, ours in MODEL_NAMES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    layer = re.fullmatch(r"(model\.layers\.\d+)\.([a-z_]+)\.(.+)", name)
    return f"{layer[1]}.{LAYER_NAMES.get(layer[2], layer[2])}.{layer[3]}" if layer else name
