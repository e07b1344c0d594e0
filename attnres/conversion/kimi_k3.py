"""The layout of the public Kimi K3: configuration keys, tensor names and shapes."""

import re

from transformers import AutoConfig, PreTrainedConfig

from ..configuration_attnres import AttnResConfig
from ..configuration_kimi_k3 import LINEAR_KEYS, OWN_LINEAR_KEYS, SITU, KimiK3Config
from . import engines
from .checkpoint import Checkpoint, CheckpointError
from .mxfp4 import FORMAT, PACKED, SCALE

BLOCK_SIZE = "attn_res_block_size"
PREFIX = "language_model."
TEXT_TYPE, ROOT_TYPE = "kimi_linear", "kimi_k3"
BACKBONES = ("kimi_linear", "kimi_k3")
DECAY_RATES = ".self_attn.A_log"
DECAY_RATES_MULTIPLE = 128  # the release pads them to a multiple of this

# Keys with the same name and meaning in the release and in both backbones, and in the kimi_k3 backbone only.
KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("num_experts", "num_experts_per_token", "num_shared_experts", "moe_intermediate_size", "moe_renormalize"),
    *("routed_scaling_factor", "num_expert_group", "topk_group"),
    *("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "use_cache"),
)
OWN_KEYS = (
    *("activation_situ_beta", "activation_situ_linear_beta", "mla_use_output_gate"),
    *("routed_expert_hidden_size", "latent_moe_use_norm", "moe_router_activation_func"),
)
# Keys of the whole checkpoint, and keys without effect, because Kimi K3 has no rotary embedding.
NOT_OF_THE_BACKBONE = {
    *("model_type", "architectures", "auto_map", "quantization_config", "transformers_version", BLOCK_SIZE),
    *("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "num_nextn_predict_layers"),
}


def is_k3(config: dict) -> bool:
    """Returns whether the content of a `config.json` is in this layout."""
    text = config.get("text_config")
    return (isinstance(text, dict) and config.get("model_type") == ROOT_TYPE) or BLOCK_SIZE in text_config(config)


def text_config(config: dict) -> dict:
    """Returns the part of a `config.json` that describes the text model, which is all of it in a text-only model."""
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def read_config(checkpoint: Checkpoint) -> AttnResConfig:
    """Returns the AttnRes configuration of the text model."""
    folder, text = checkpoint.folder, text_config(checkpoint.config)
    if text.get("model_type") not in (TEXT_TYPE, ROOT_TYPE):
        raise CheckpointError(
            f"{folder}: its text model has model_type {text.get('model_type')!r}; only {TEXT_TYPE} is converted."
        )
    if text.get("num_nextn_predict_layers"):
        raise CheckpointError(
            f"{folder}: has layers for multi-token prediction (num_nextn_predict_layers="
            f"{text['num_nextn_predict_layers']}), which are not converted; set it to 0 and remove their tensors."
        )
    found = quantisation(checkpoint.config)
    if found and not (isinstance(found, dict) and found.get("format") == FORMAT):
        kind = found.get("format") or found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(f"{folder}: quantization_config: {kind!r} is not read, only {FORMAT} is.")
    backbone = KimiK3Config(**{key: value for key, value in text.items() if key not in NOT_OF_THE_BACKBONE})
    backbone.architectures = None
    if not _needs_own_backbone(backbone):
        keys = (*KEYS, *LINEAR_KEYS.values(), "layer_types", "mlp_layer_types")
        options, length = {key: getattr(backbone, key) for key in keys}, backbone.max_position_embeddings
        backbone = AutoConfig.for_model("kimi_linear", **options, model_max_length=length, dtype=backbone.dtype)
    block_size = text.get(BLOCK_SIZE)
    depth = {"residual_mode": "standard"} if block_size is None else {"layers_per_block": block_size}
    return AttnResConfig(backbone_config=backbone, dtype=backbone.dtype, **depth)


def _needs_own_backbone(config: KimiK3Config) -> bool:
    """Returns whether a model has a feature that transformers' Kimi Linear lacks or computes differently."""
    return bool(
        config.hidden_act != "silu"
        or config.mla_use_output_gate
        or config.linear_use_full_rank_gate
        or config.linear_gate_lower_bound is not None
        or config.routed_expert_hidden_size is not None
        or config.moe_router_activation_func != "sigmoid"
        or config.num_experts is None
        or config.num_experts < 2 * config.num_expert_group
        or config.num_shared_experts == 0
        or (config.num_experts_per_token == 1 and config.moe_renormalize)
        or config.tie_word_embeddings
    )


def quantisation(config: dict) -> dict | None:
    """Returns the `quantization_config` of a `config.json`, at its top or in its `text_config`."""
    return config.get("quantization_config") or text_config(config).get("quantization_config")


def packed_pairs(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Returns, by the canonical name of each packed weight, the names on disk of its codes and its scales."""
    pairs = {}
    for weight in [name.removesuffix(PACKED) for name in names if name.endswith(PACKED)]:
        if weight + SCALE not in names:
            raise CheckpointError(f"{checkpoint.folder}: lacks {weight + SCALE}, the scales of {weight + PACKED}.")
        pair = names[weight + PACKED], names[weight + SCALE]
        (_, dtype, shape), (_, scale_dtype, scales) = (checkpoint.tensors[name] for name in pair)
        fits = len(shape) == len(scales) == 2 and shape == (scales[0], 16 * scales[1])
        if not fits or (dtype, scale_dtype) != ("U8", "U8"):
            raise CheckpointError(
                f"{checkpoint.folder}: {weight + PACKED} is {dtype} {list(shape)} with scales {scale_dtype} "
                f"{list(scales)}; MXFP4 is U8 with one U8 scale per 16 bytes of a row."
            )
        pairs[f"{weight}.weight"] = pair
    return pairs


def own_names(checkpoint: Checkpoint, config: AttnResConfig) -> tuple[dict[str, str], list[str]]:
    """Returns the text model's tensor names without prefix, with those on disk, and the names of other tensors."""
    names, left_out = {name: name for name in checkpoint.tensors}, []
    if any(name.startswith(PREFIX) for name in names):
        left_out = sorted(name for name in names if not name.startswith(PREFIX))
        names = {name.removeprefix(PREFIX): name for name in names if name.startswith(PREFIX)}
    names = {f"model.{name}" if name.startswith("layers.") else name: stored for name, stored in names.items()}
    for name, stored in names.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if re.match(r"(model\.)?mtp\.", name) or (layer and int(layer[1]) >= config.num_hidden_layers):
            raise CheckpointError(
                f"{checkpoint.folder}: {stored} belongs to a layer for multi-token prediction, which is not converted; "
                "remove the tensors of those layers."
            )
    return names, left_out


def canonical_name(name: str, backbone: PreTrainedConfig) -> str:
    """Returns the release's name of a tensor: transformers' Kimi Linear saves dense MLPs as `block_sparse_moe`."""
    layer = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.", name) if backbone.model_type in BACKBONES else None
    if layer and int(layer[1]) < len(backbone.mlp_layer_types) and backbone.mlp_layer_types[int(layer[1])] == "dense":
        return name.replace(".block_sparse_moe.", ".mlp.")
    return name


def saved_name(name: str, backbone: PreTrainedConfig) -> str:
    """Returns the name under which the backbone itself saves a tensor; the inverse of `canonical_name`."""
    if backbone.model_type == "kimi_linear":
        return re.sub(r"^(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.", r"\1.block_sparse_moe.\2_proj.", name)
    return name


def merges_gates(backbone: PreTrainedConfig, engine: str | None) -> bool:
    """Returns whether the two matrices of the linear attention's output gate are written as their product."""
    return engines.insists(engine, engines.FULL_RANK_GATE) and not getattr(backbone, "linear_use_full_rank_gate", False)


def unties_head(backbone: PreTrainedConfig, engine: str | None) -> bool:
    """Returns whether tied embeddings are written a second time, as the head."""
    return engines.insists(engine, engines.UNTIED_HEAD) and backbone.tie_word_embeddings


def is_multimodal(backbone: PreTrainedConfig, engine: str | None) -> bool:
    """Returns whether the text model is written as the `text_config` of the multimodal model."""
    if engine is None:
        return backbone.model_type == "kimi_k3"
    return engines.ENGINES[engine].architecture == engines.MULTIMODAL


def write_config(config: AttnResConfig, engine: str | None = None, quantised: dict | None = None) -> dict:
    """Returns the `config.json` of a model, in the form that an engine loads; `quantised` describes packed weights."""
    backbone = config.backbone_config
    is_linear = backbone.model_type == "kimi_linear"
    if backbone.model_type not in BACKBONES:
        raise CheckpointError(f"--to kimi-k3 needs a {' or '.join(BACKBONES)} backbone, got {backbone.model_type}.")
    if config.residual_mode != "block":
        raise CheckpointError(f"--to kimi-k3 needs residual_mode block, got {config.residual_mode}.")
    if engine is not None:
        engines.check_engine(engine, backbone)
    if is_linear and backbone.num_experts_per_token == 1 and backbone.moe_renormalize:
        raise CheckpointError(
            "--to kimi-k3 needs more than one expert per token or moe_renormalize false, got num_experts_per_token=1: "
            "Kimi K3 uses the score of a single expert as it is, transformers' Kimi Linear replaces it by 1."
        )
    first_dense, frequency = _sparse_layers(backbone)
    length_key = "model_max_length" if is_linear and engine is None else "max_position_embeddings"

    def layers_of(kind: str) -> list[int]:
        return [layer for layer, found in enumerate(backbone.layer_types, 1) if found == kind]

    text = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": TEXT_TYPE,
        BLOCK_SIZE: config.layers_per_block,
        **{key: getattr(backbone, key) for key in KEYS},
        length_key: backbone.max_position_embeddings,
        "first_k_dense_replace": first_dense,
        "moe_layer_freq": frequency,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "linear_attn_config": {
            "full_attn_layers": layers_of("full_attention"),
            "kda_layers": layers_of("linear_attention"),
            **{key: getattr(backbone, name) for key, name in LINEAR_KEYS.items()},
        },
    }
    if not is_linear:
        text |= {key: getattr(backbone, key) for key in OWN_KEYS}
        text["linear_attn_config"] |= {key: getattr(backbone, name) for key, name in OWN_LINEAR_KEYS.items()}
    if engine is not None:
        _adapt(text, backbone, engine)
    if config.dtype is not None:
        text["dtype"] = str(config.dtype).removeprefix("torch.")
    if quantised is not None:
        text["quantization_config"] = quantised
    if not is_multimodal(backbone, engine):
        return text
    repeated = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype")
    root = {key: text[key] for key in repeated if key in text}
    return {"architectures": [engines.MULTIMODAL], "model_type": ROOT_TYPE, "text_config": text, **root}


def _adapt(text: dict, backbone: PreTrainedConfig, engine: str):
    """Changes a text configuration to the form that an engine loads, which describes the same function."""
    if not is_multimodal(backbone, engine):
        text["architectures"] = [engines.ENGINES[engine].architecture]
    if engines.insists(engine, engines.SITU):
        is_situ = text["hidden_act"] == SITU
        beta, linear_beta = text.get("activation_situ_beta"), text.get("activation_situ_linear_beta")
        text["hidden_act"] = SITU
        text["activation_situ_beta"] = (beta or 1.0) if is_situ else engines.UNBOUNDED
        text["activation_situ_linear_beta"] = linear_beta if is_situ and linear_beta is not None else engines.UNBOUNDED
    if merges_gates(backbone, engine):
        text["linear_attn_config"]["use_full_rank_gate"] = True
    if unties_head(backbone, engine):
        text["tie_word_embeddings"] = False
    if text["num_experts"] is None and engines.insists(engine, engines.EXPERT_SIZE):
        text["moe_intermediate_size"] = text["intermediate_size"]
    if text["num_experts_per_token"] == 1 and backbone.model_type == "kimi_k3":
        text["moe_renormalize"] = False  # the official code uses the score of a single expert as it is


def _sparse_layers(backbone: PreTrainedConfig) -> tuple[int, int]:
    """Returns the `first_k_dense_replace` and `moe_layer_freq` that describe which layers have experts."""
    sparse = [kind == "sparse" for kind in backbone.mlp_layer_types]
    if not any(sparse):
        return len(sparse), 1
    first = sparse.index(True)
    for frequency in range(1, len(sparse) + 1):
        if sparse == [layer >= first and layer % frequency == 0 for layer in range(len(sparse))]:
            return first, frequency
    raise CheckpointError(
        "--to kimi-k3 needs all dense layers first (first_k_dense_replace) or every n-th layer sparse "
        "(moe_layer_freq); mlp_layer_types has another order."
    )
