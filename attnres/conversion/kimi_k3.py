"""The layout of the public Kimi K3: its configuration keys, tensor names and shapes."""

import re

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..configuration_attnres import AttnResConfig
from ..configuration_kimi_k3 import SITU as SITU_ACTIVATION
from ..configuration_kimi_k3 import KimiK3Config
from .checkpoint import Checkpoint, CheckpointError
from .engines import ENGINES, EXPERT_SIZE, FULL_RANK_GATE, SITU, UNBOUNDED, UNTIED_HEAD, check_engine
from .mxfp4 import FORMAT, PACKED, SCALE

BLOCK_SIZE = "attn_res_block_size"
PREFIX = "language_model."
TEXT_TYPE, ROOT_TYPE = "kimi_linear", "kimi_k3"
BACKBONES = ("kimi_linear", "kimi_k3")
DECAY_RATES = ".self_attn.A_log"
DECAY_RATES_MULTIPLE = 128  # the release pads them to a multiple of this

# Keys with the same name and meaning here and there.
KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "num_experts",
    "num_experts_per_token",
    "num_shared_experts",
    "moe_renormalize",
    "routed_scaling_factor",
    "num_expert_group",
    "topk_group",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
]
OWN_KEYS = [
    "activation_situ_beta",
    "activation_situ_linear_beta",
    "mla_use_output_gate",
    "routed_expert_hidden_size",
    "latent_moe_use_norm",
    "moe_router_activation_func",
]
LINEAR_KEYS = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
OWN_LINEAR_KEYS = {"use_full_rank_gate": "linear_use_full_rank_gate", "gate_lower_bound": "linear_gate_lower_bound"}

# Keys of the whole checkpoint, and those that are not used: nothing is rotated.
NOT_OF_THE_BACKBONE = {
    *("model_type", "architectures", "auto_map", "quantization_config", "transformers_version", BLOCK_SIZE),
    *("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "num_nextn_predict_layers"),
}

# What transformers' Kimi Linear does not compute as Kimi K3 does: such a model gets the backbone of our own.
OWN_FEATURES = (
    lambda config: config.hidden_act != "silu",
    lambda config: config.mla_use_output_gate,
    lambda config: config.linear_use_full_rank_gate,
    lambda config: config.linear_gate_lower_bound is not None,
    lambda config: config.routed_expert_hidden_size is not None,
    lambda config: config.moe_router_activation_func != "sigmoid",
    lambda config: config.num_experts is None or config.num_experts < 2 * config.num_expert_group,
    lambda config: config.num_shared_experts == 0,
    lambda config: config.num_experts_per_token == 1 and config.moe_renormalize,
    lambda config: config.tie_word_embeddings,
)

# Of drafters for speculative decoding, which are no language models of their own.
DRAFTERS = ("eagle", "medusa", "dspark", "dflash", "draft", "mtp")
MTP_TENSOR = re.compile(r"(model\.)?mtp\.")


def is_k3(config: dict) -> bool:
    """Whether a `config.json` is of this layout."""
    text = config.get("text_config")
    return (isinstance(text, dict) and config.get("model_type") == ROOT_TYPE) or BLOCK_SIZE in text_config(config)


def text_config(config: dict) -> dict:
    """Of a `config.json`: that of the text model, which may be all of it."""
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def read_config(checkpoint: Checkpoint) -> AttnResConfig:
    """The configuration of the text model, as an AttnRes one.

    Raises:
        CheckpointError: it is of a part or kind of model that is not read, by its name.
    """
    folder, text = checkpoint.folder, text_config(checkpoint.config)
    kinds = [str(part.get(key)) for part in (checkpoint.config, text) for key in ("architectures", "model_type")]
    drafter = next((kind for kind in kinds if any(word in kind.lower() for word in DRAFTERS)), None)
    if drafter is not None:
        raise CheckpointError(f"{folder}: is a drafter for speculative decoding ({drafter}), not a language model.")
    if "vision" in str(text.get("model_type")):
        raise CheckpointError(f"{folder}: is a vision model ({text['model_type']}); only the text model is converted.")
    if text.get("model_type") not in (TEXT_TYPE, ROOT_TYPE):
        raise CheckpointError(
            f"{folder}: its text model is of model_type {text.get('model_type')!r}; the Kimi K3 layout has {TEXT_TYPE}."
        )
    if text.get("num_nextn_predict_layers"):
        raise CheckpointError(
            f"{folder}: has layers for multi-token prediction (num_nextn_predict_layers="
            f"{text['num_nextn_predict_layers']}), which are not converted; set it to 0 and remove their tensors."
        )
    k3 = KimiK3Config(**{key: value for key, value in text.items() if key not in NOT_OF_THE_BACKBONE})
    k3.architectures = None
    backbone = k3
    if not any(has_feature(k3) for has_feature in OWN_FEATURES):
        options = {key: getattr(k3, key) for key in KEYS}
        options |= {name: getattr(k3, name) for name in (*LINEAR_KEYS.values(), "layer_types", "mlp_layer_types")}
        length = k3.max_position_embeddings
        backbone = AutoConfig.for_model("kimi_linear", **options, model_max_length=length, dtype=k3.dtype)
    block_size = text.get(BLOCK_SIZE)
    depth = {"residual_mode": "standard"} if block_size is None else {"layers_per_block": block_size}
    return AttnResConfig(backbone_config=backbone, dtype=backbone.dtype, **depth)


def quantisation(config: dict) -> dict | None:
    """The `quantization_config`, wherever it is."""
    return config.get("quantization_config") or text_config(config).get("quantization_config")


def check_quantisation(checkpoint: Checkpoint):
    """Raises CheckpointError for another kind of quantisation than MXFP4 of compressed-tensors."""
    found = quantisation(checkpoint.config)
    if found and not (isinstance(found, dict) and found.get("format") == FORMAT):
        kind = found.get("format") or found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(f"{checkpoint.folder}: quantization_config: {kind!r} is not read, only {FORMAT} is.")


def packed_pairs(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name of every weight that is stored packed, and the names on disk of its packed part and its scales.

    Args:
        names: canonical names and those on disk.

    Raises:
        CheckpointError: a pair that is not MXFP4.
    """
    pairs = {}
    for name, stored in names.items():
        if not name.endswith(PACKED):
            continue
        weight = name.removesuffix(PACKED)
        scale = names.get(weight + SCALE)
        if scale is None:
            raise CheckpointError(f"{checkpoint.folder}: lacks {weight + SCALE}, the scales of {name}.")
        one, other = checkpoint.tensors[stored], checkpoint.tensors[scale]
        fits = len(one.shape) == len(other.shape) == 2 and one.shape == (other.shape[0], 16 * other.shape[1])
        if not fits or (one.dtype, other.dtype) != ("U8", "U8"):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {one.dtype} {list(one.shape)} with scales {other.dtype} "
                f"{list(other.shape)}, which is not MXFP4 (U8, a scale for 16 bytes)."
            )
        pairs[f"{weight}.weight"] = (stored, scale)
    return pairs


def own_names(checkpoint: Checkpoint, config: AttnResConfig) -> tuple[dict[str, str], list[str]]:
    """Names of the text model's tensors, without prefix, and those on disk; and what belongs to other parts.

    Raises:
        CheckpointError: layers for multi-token prediction, by name.
    """
    names, left_out = {name: name for name in checkpoint.tensors}, []
    if any(name.startswith(PREFIX) for name in names):
        left_out = sorted(name for name in names if not name.startswith(PREFIX))
        names = {name.removeprefix(PREFIX): name for name in names if name.startswith(PREFIX)}
    names = {f"model.{name}" if name.startswith("layers.") else name: stored for name, stored in names.items()}
    for name, stored in names.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if MTP_TENSOR.match(name) or (layer and int(layer[1]) >= config.num_hidden_layers):
            raise CheckpointError(
                f"{checkpoint.folder}: {stored} belongs to a layer for multi-token prediction; those are not "
                "converted, remove them."
            )
    return names, left_out


def canonical_name(name: str, backbone: PreTrainedConfig) -> str:
    """What the release calls a tensor: transformers' Kimi Linear saves dense MLPs as `block_sparse_moe`."""
    layer = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.", name) if backbone.model_type in BACKBONES else None
    if layer and int(layer[1]) < len(backbone.mlp_layer_types) and backbone.mlp_layer_types[int(layer[1])] == "dense":
        return name.replace(".block_sparse_moe.", ".mlp.")
    return name


def saved_name(name: str, backbone: PreTrainedConfig) -> str:
    """The other way round: what the backbone's own save calls it."""
    if backbone.model_type == "kimi_linear":
        return re.sub(r"^(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.", r"\1.block_sparse_moe.\2_proj.", name)
    return name


def decay_rates_shape(backbone: PreTrainedConfig, engine: str | None) -> tuple[int, ...]:
    """Shape of `A_log` in this layout: padded as in the release, but where it is Kimi Linear's or for an engine."""
    heads = backbone.linear_num_heads
    if backbone.model_type == "kimi_linear" or engine is not None:
        return (heads,)
    return (-(-heads // DECAY_RATES_MULTIPLE) * DECAY_RATES_MULTIPLE,)


def merges_gates(backbone: PreTrainedConfig, engine: str | None) -> bool:
    """Whether the two matrices of the linear attention's output gate are written as their product."""
    has_full_rank = getattr(backbone, "linear_use_full_rank_gate", False)
    return engine is not None and FULL_RANK_GATE in ENGINES[engine].insists_on and not has_full_rank


def unties_head(backbone: PreTrainedConfig, engine: str | None) -> bool:
    """Whether the embeddings are written a second time, as the head."""
    return engine is not None and UNTIED_HEAD in ENGINES[engine].insists_on and backbone.tie_word_embeddings


def is_multimodal(backbone: PreTrainedConfig, engine: str | None) -> bool:
    """Whether the text model is written as a part of the multimodal one, of which nothing else is written."""
    return backbone.model_type == "kimi_k3" if engine is None else ENGINES[engine].multimodal


def write_config(config: AttnResConfig, engine: str | None = None, quantised: dict | None = None) -> dict:
    """The `config.json` of an AttnRes model with a Kimi backbone.

    Args:
        engine: key of `ENGINES`, for which equal functions are written.
        quantised: `quantization_config` of weights that stay packed.

    Raises:
        CheckpointError: what this layout or the engine cannot say.
    """
    backbone = config.backbone_config
    if backbone.model_type not in BACKBONES:
        raise CheckpointError(f"--to kimi-k3 needs a {' or '.join(BACKBONES)} backbone, got {backbone.model_type}.")
    if config.residual_mode != "block":
        raise CheckpointError(f"--to kimi-k3 needs residual_mode block, got {config.residual_mode}.")
    if engine is not None:
        check_engine(engine, backbone)
    if backbone.model_type == "kimi_linear" and backbone.num_experts_per_token == 1 and backbone.moe_renormalize:
        raise CheckpointError(
            "--to kimi-k3 needs more than one expert per token or moe_renormalize false, got num_experts_per_token=1: "
            "Kimi K3 takes the score of a single expert as it is, transformers' Kimi Linear makes it 1."
        )
    first_dense, frequency = _sparse_layers(backbone)

    def layers_of(kind: str) -> list[int]:
        return [layer for layer, found in enumerate(backbone.layer_types, 1) if found == kind]

    linear = {key: getattr(backbone, name) for key, name in LINEAR_KEYS.items()}
    text = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": TEXT_TYPE,
        BLOCK_SIZE: config.layers_per_block,
        **{key: getattr(backbone, key) for key in KEYS},
        "first_k_dense_replace": first_dense,
        "moe_layer_freq": frequency,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "linear_attn_config": {
            "full_attn_layers": layers_of("full_attention"),
            "kda_layers": layers_of("linear_attention"),
            **linear,
        },
    }
    if backbone.model_type == "kimi_linear" and engine is None:
        text["model_max_length"] = backbone.max_position_embeddings
    else:
        text["max_position_embeddings"] = backbone.max_position_embeddings
    if backbone.model_type == "kimi_k3":
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
    root = {key: text[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id", "dtype") if key in text}
    root |= {"tie_word_embeddings": text["tie_word_embeddings"]}
    return {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": ROOT_TYPE, "text_config": text, **root}


def _adapt(text: dict, backbone: PreTrainedConfig, name: str):
    """Says the same to an engine that does not know Kimi Linear's way to say it."""
    engine = ENGINES[name]
    if not engine.multimodal:
        text["architectures"] = [engine.architecture]
    if SITU in engine.insists_on:
        text.setdefault("activation_situ_beta", None)
        text.setdefault("activation_situ_linear_beta", None)
        beta, linear_beta = text["activation_situ_beta"], text["activation_situ_linear_beta"]
        if text["hidden_act"] == SITU_ACTIVATION:
            beta = beta or 1.0
            linear_beta = UNBOUNDED if linear_beta is None else linear_beta
        else:
            beta = linear_beta = UNBOUNDED
        text |= {
            "hidden_act": SITU_ACTIVATION,
            "activation_situ_beta": beta,
            "activation_situ_linear_beta": linear_beta,
        }
    if merges_gates(backbone, name):
        text["linear_attn_config"]["use_full_rank_gate"] = True
    if unties_head(backbone, name):
        text["tie_word_embeddings"] = False
    if text["num_experts"] is None and EXPERT_SIZE in engine.insists_on:
        text["moe_intermediate_size"] = text["intermediate_size"]
    if text["num_experts_per_token"] == 1 and backbone.model_type == "kimi_k3":
        text["moe_renormalize"] = False  # of a single expert the official code takes the score as it is


def _sparse_layers(backbone: PreTrainedConfig) -> tuple[int, int]:
    """`first_k_dense_replace` and `moe_layer_freq` of the layers that have experts."""
    kinds = backbone.mlp_layer_types
    layers = range(backbone.num_hidden_layers)
    if "sparse" not in kinds:
        return len(kinds), 1
    first = kinds.index("sparse")
    for frequency in layers:
        wanted = [layer >= first and layer % (frequency + 1) == 0 for layer in layers]
        if wanted == [kind == "sparse" for kind in kinds]:
            return first, frequency + 1
    raise CheckpointError(
        "--to kimi-k3 needs all dense layers first (first_k_dense_replace) or every n-th layer sparse "
        "(moe_layer_freq); mlp_layer_types has others."
    )


def merged_gate(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """One matrix `[H * head dim, D]` for two, `[head dim, D]` and `[H * head dim, head dim]`."""
    return high.double() @ low.double()
