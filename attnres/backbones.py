"""The differences between the supported backbone families, as a table. All other code is shared.

A family is supported if its decoder layer is PreNorm-additive: x + f(norm(x)), twice. Replacing the sum by a mean of
the sources then only rescales the input of an RMSNorm, which is why a conversion is lossless.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .configuration_kimi_k3 import KimiK3Config
from .modeling_kimi_k3 import KimiK3ForCausalLM, KimiK3Model

# transformers does not have this family.
AutoConfig.register(KimiK3Config.model_type, KimiK3Config, exist_ok=True)
AutoModel.register(KimiK3Config, KimiK3Model, exist_ok=True)
AutoModelForCausalLM.register(KimiK3Config, KimiK3ForCausalLM, exist_ok=True)

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}

# The mask of each decoder layer.
CAUSAL = "causal"  # causal in all layers
SLIDING_IF_SET = "sliding_if_set"  # the same in all layers, sliding if the configuration has a window
BY_LAYER_TYPE = "by_layer_type"  # according to config.layer_types


@dataclass(frozen=True)
class Family:
    """The names of modules and configuration keys with which a family's model is put together."""

    masks: str  # CAUSAL, SLIDING_IF_SET or BY_LAYER_TYPE

    # Modules of the decoder layer. Post-norms (Gemma) and dropouts belong to a sublayer's output.
    attention: str = "self_attn"
    linear_attention: str = "self_attn"  # in layers of that type; takes the cache as `cache_params`
    mlp: str = "mlp"  # or mixture of experts
    attention_pre_norm: str = "input_layernorm"
    mlp_pre_norm: str = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    attention_dropout: str | None = None
    mlp_dropout: str | None = None

    norm_offset: float = 0.0  # is added to the weight of a pre-norm
    rotary_by_layer_type: bool = False  # whether each layer type has its own rotary embedding

    # Configuration keys.
    output_multiplier: str | None = None  # a factor on every sublayer output, which becomes part of the source
    embedding_multiplier: str | None = None  # a factor on the embeddings
    logits_divisor: str | None = None
    logits_softcap: str | None = None  # c in c * tanh(logits / c)
    lm_head_bias: str | None = None  # whether the head has a bias
    cache_reset_length: str | None = None  # the prompt length beyond which rotary factors change, and all cached keys


_GRANITE = {
    "masks": CAUSAL,
    "output_multiplier": "residual_multiplier",
    "embedding_multiplier": "embedding_multiplier",
    "logits_divisor": "logits_scaling",
}
_GEMMA = {
    "masks": BY_LAYER_TYPE,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_pre_norm": "pre_feedforward_layernorm",
    "norm_offset": 1.0,
    "mlp_post_norm": "post_feedforward_layernorm",
    "logits_softcap": "final_logit_softcapping",
}

FAMILIES = {
    "llama": Family(CAUSAL),
    "mistral": Family(SLIDING_IF_SET),
    "qwen2": Family(BY_LAYER_TYPE),
    "qwen3": Family(BY_LAYER_TYPE),
    "smollm3": Family(BY_LAYER_TYPE),
    "phi3": Family(
        SLIDING_IF_SET,
        attention_dropout="resid_attn_dropout",
        mlp_dropout="resid_mlp_dropout",
        cache_reset_length="original_max_position_embeddings",
    ),
    "mixtral": Family(SLIDING_IF_SET),
    "qwen2_moe": Family(BY_LAYER_TYPE),
    "qwen3_moe": Family(SLIDING_IF_SET),
    "olmoe": Family(CAUSAL),
    "gpt_oss": Family(BY_LAYER_TYPE),
    "deepseek_v2": Family(CAUSAL),
    "deepseek_v3": Family(CAUSAL),
    "glm4_moe": Family(CAUSAL),
    "ernie4_5_moe": Family(CAUSAL, lm_head_bias="use_bias"),
    "minimax_m2": Family(CAUSAL),
    "qwen3_next": Family(BY_LAYER_TYPE, linear_attention="linear_attn", norm_offset=1.0),
    "kimi_linear": Family(BY_LAYER_TYPE),
    "kimi_k3": Family(BY_LAYER_TYPE),
    "granite": Family(**_GRANITE),
    "granitemoe": Family(**_GRANITE, mlp="block_sparse_moe"),
    "gemma2": Family(**_GEMMA),
    "gemma3_text": Family(**_GEMMA, rotary_by_layer_type=True),
}

_POST_NORM = (
    "is post-norm only: its decoder layer computes x + norm(f(x)) on the raw residual stream, so a mean of sources "
    "is not what it computes and no conversion is lossless"
)
REFUSED = {
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "gemma3": "is multimodal: use its language model, a gemma3_text configuration",
    "inkling2": "has a different depth mechanism (normed values, several queries), which is not Attention Residuals",
}


def check_supported(backbone: PreTrainedConfig | str):
    """Checks that a family, given by a configuration or a `model_type`, can be the backbone of an AttnRes model."""
    model_type = backbone if isinstance(backbone, str) else backbone.model_type
    if model_type in FAMILIES:
        return
    reason = REFUSED.get(
        model_type, "is not known to be PreNorm-additive (x + f(norm(x))), which a lossless conversion needs"
    )
    raise ValueError(
        f"backbone model_type {model_type!r} is not supported: it {reason}. Supported: {', '.join(FAMILIES)}."
    )


def get_family(config: PreTrainedConfig) -> Family:
    """Returns the `Family` of a backbone configuration."""
    check_supported(config)
    return FAMILIES[config.model_type]


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the family's class with a language-modelling head."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def build_base_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds the family's model without a head. With the same seed its weights are those of the plain model."""
    return MODEL_MAPPING[type(config)](config)


def init_weights(config: PreTrainedConfig, module: nn.Module):
    """Initialises one module (experts, routers, decay rates, sinks, ...) as the family does."""
    owner_class = causal_lm_class(config)
    owner = object.__new__(owner_class)  # initialisation only reads the configuration, so no model has to be built
    owner.__dict__["config"] = config
    owner._init_weights(module)


def build_lm_head(config: PreTrainedConfig) -> nn.Linear:
    """Builds the family's language-modelling head without initialising it."""
    key = get_family(config).lm_head_bias
    return nn.Linear(config.hidden_size, config.vocab_size, bias=bool(key and getattr(config, key)))


def checkpoint_conversions(config: PreTrainedConfig) -> list:
    """Returns the family's converters between the tensors on disk (one per expert, ...) and in memory."""
    conversions = get_checkpoint_conversion_mapping(config.model_type) or []
    # Some families rename ".block_sparse_moe." to ".mlp." without escaping the dots. Reverted, the pattern would also
    # match "_mlp_" and ".mlp_" in the names of the depth tensors.
    loose = [".block_sparse_moe.", ".mlp."]
    return [
        WeightRenaming(source_patterns=r"\.block_sparse_moe\.", target_patterns=r"\.mlp\.")
        if isinstance(conversion, WeightRenaming)
        and [*conversion.source_patterns, *conversion.target_patterns] == loose
        else conversion
        for conversion in conversions
    ]


def scale_logits(config: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """Applies the family's scaling and soft cap to the logits."""
    family = get_family(config)
    if family.logits_divisor is not None:
        logits = logits / getattr(config, family.logits_divisor)
    if family.logits_softcap is not None and (cap := getattr(config, family.logits_softcap)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def layer_type(config: PreTrainedConfig, layer_idx: int) -> str:
    """Returns the type of a decoder layer: `full_attention`, `sliding_attention` or `linear_attention`."""
    return types_of_layers(config, [layer_idx])[layer_idx]


def types_of_layers(config: PreTrainedConfig, indices: Iterable[int]) -> dict[int, str]:
    """Returns the types of several decoder layers; it reads the configuration once, as that is slow."""
    masks = get_family(config).masks
    if masks == BY_LAYER_TYPE:
        every = config.layer_types
        return {index: every[index] for index in indices}
    sliding = masks == SLIDING_IF_SET and getattr(config, "sliding_window", None) is not None
    return dict.fromkeys(indices, "sliding_attention" if sliding else "full_attention")


def create_masks(config: PreTrainedConfig, layer_types: Iterable[str], attention_mask, **mask_inputs) -> dict:
    """Creates one mask per layer type, or returns the masks that `generate` has prepared."""
    if isinstance(attention_mask, dict):
        return attention_mask
    return {kind: MASKS[kind](config=config, attention_mask=attention_mask, **mask_inputs) for kind in layer_types}


def rotary_inputs(
    config: PreTrainedConfig, layer_types: Iterable[str], rotary_emb: nn.Module | None, hidden_states, position_ids
) -> dict[str, dict]:
    """Returns, per layer type, the position embeddings as arguments of the attention; {} without rotary embeddings."""
    if rotary_emb is None:
        return {kind: {} for kind in layer_types}
    if get_family(config).rotary_by_layer_type:
        return {kind: {"position_embeddings": rotary_emb(hidden_states, position_ids, kind)} for kind in layer_types}
    same = {"position_embeddings": rotary_emb(hidden_states, position_ids)}
    return dict.fromkeys(layer_types, same)


def load_balancing_loss(config: PreTrainedConfig) -> Callable | None:
    """Returns the family's auxiliary loss, a function of (router_logits, attention_mask), or `None`."""
    function = getattr(sys.modules[causal_lm_class(config).__module__], "load_balancing_loss_func", None)
    if function is None or getattr(config, "router_aux_loss_coef", None) is None:
        return None
    key = "num_experts" if hasattr(config, "num_experts") else "num_local_experts"
    return lambda router_logits, attention_mask: function(
        router_logits, getattr(config, key), config.num_experts_per_tok, attention_mask
    )
