"""What a checkpoint is (plain, AttnRes, Kimi K3-style) and how each is written: configuration keys, names, shapes.

Whatever the layout on disk, tensors have one canonical name in here: that of an AttnRes checkpoint on disk.
"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..backbones import FAMILIES, check_supported
from ..configuration_attnres import AttnResConfig
from ..depth_variants import VARIANTS
from .checkpoint import Checkpoint, CheckpointError, TensorInfo

PRENORM, ATTNRES, KIMI_K3 = "prenorm", "attnres", "kimi-k3"
LAYOUTS = (PRENORM, ATTNRES, KIMI_K3)
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
VARIANT_NAME = "model.depth_mixer.variant_norm.weight"  # what a depth variant learns besides pseudo-queries
K3_BLOCK_SIZE = "attn_res_block_size"
K3_PREFIX = "language_model."

# Features of Kimi K3 that transformers' Kimi Linear does not compute: configuration key, who is refused, what it is.
K3_REFUSED = (
    ("hidden_act", lambda value: value == "situ", "the SiTU activation"),
    ("routed_expert_hidden_size", lambda value: value is not None, "latent MoE"),
    ("latent_moe_use_norm", bool, "latent MoE with a norm"),
    ("mla_use_output_gate", bool, "the MLA output gate"),
    ("mla_use_nope", lambda value: value is False, "rotary MLA"),
    ("moe_router_activation_func", lambda value: value not in (None, "sigmoid"), "another router than sigmoid"),
    ("linear_attn_config.use_full_rank_gate", bool, "the full-rank KDA gate"),
    ("linear_attn_config.gate_lower_bound", lambda value: value is not None, "a lower bound of the KDA gate"),
    ("quantization_config", bool, "quantised (MXFP4) shards"),
)

# Keys of a Kimi K3-style configuration that have the same name and meaning in transformers' Kimi Linear.
K3_KEYS = [
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
    "model_max_length",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
]


@dataclass
class Source:
    """A checkpoint, understood.

    Attributes:
        checkpoint: what is on disk.
        layout: one of `LAYOUTS`.
        config: as an AttnRes configuration; that of the lossless conversion for a plain checkpoint.
        stored_names: canonical name to name on disk.
        left_out: names on disk that belong to another part of a multimodal checkpoint.
    """

    checkpoint: Checkpoint
    layout: str
    config: AttnResConfig
    stored_names: dict[str, str]
    left_out: list[str]

    def tensor(self, name: str) -> TensorInfo:
        """What the header says of a tensor, by canonical name."""
        return self.checkpoint.tensors[self.stored_names[name]]

    @property
    def depth_names(self) -> set[str]:
        """The depth tensors that an AttnRes checkpoint of this many layers has."""
        names = depth_names(self.config.num_hidden_layers)
        return names if VARIANTS[self.config.depth_variant].initial is None else names | {VARIANT_NAME}


def depth_names(layers: int) -> set[str]:
    """Names of the depth tensors on disk."""
    kinds = ("self_attention_res_proj", "self_attention_res_norm", "mlp_res_proj", "mlp_res_norm")
    names = {f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in kinds}
    return names | {"model.output_attn_res_proj.weight", "model.output_attn_res_norm.weight"}


def understand(checkpoint: Checkpoint, layout: str | None = None) -> Source:
    """What a checkpoint is; a layout asked for that it is not is an error.

    Raises:
        CheckpointError: an unknown or unsupported kind of model, with the reason.
    """
    config = checkpoint.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    if "attnres_block_size" in config:
        raise CheckpointError(
            f"{checkpoint.folder}: is of flash-linear-attention's own model classes (attnres_block_size), whose layers "
            "are no transformers family's; convert a transformers checkpoint."
        )
    model_type = text.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: model_type must be a string, got {model_type!r}.")
    found = ATTNRES if model_type == AttnResConfig.model_type else KIMI_K3 if K3_BLOCK_SIZE in text else PRENORM
    if layout is not None and layout != found:
        raise CheckpointError(f"{checkpoint.folder}: is a {found} checkpoint, not a {layout} one as --from says.")
    names = {name: name for name in checkpoint.tensors}
    left_out: list[str] = []
    try:
        if found == KIMI_K3:
            attnres_config = _from_k3(checkpoint, text)
            if any(name.startswith(K3_PREFIX) for name in names):
                left_out = sorted(name for name in names if not name.startswith(K3_PREFIX))
                names = {name.removeprefix(K3_PREFIX): name for name in names if name.startswith(K3_PREFIX)}
        else:
            if found == PRENORM:
                check_supported(model_type)
            attnres_config = AttnResConfig.from_dict(dict(config))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a configuration class makes of untrusted values
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {' '.join(str(error).split())[:400]}") from None
    dtypes = (attnres_config.dtype, attnres_config.backbone_config.dtype)
    if not all(dtype is None or isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: dtype must be the name of a torch dtype, got {dtypes}."
        )
    return Source(checkpoint, found, attnres_config, names, left_out)


def _from_k3(checkpoint: Checkpoint, text: dict) -> AttnResConfig:
    for key, is_refused, feature in K3_REFUSED:
        value = _look_up(text, key)
        if value is not None and is_refused(value):
            raise CheckpointError(
                f"{checkpoint.folder}: {feature} ({key}={value!r}) cannot be expressed by transformers' Kimi Linear "
                "yet."
            )
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(f"{checkpoint.folder}: quantised (MXFP4) shards (quantization_config) are not converted.")
    if text["model_type"] not in FAMILIES:
        check_supported(text["model_type"])
    options = {key: value for key, value in text.items() if key not in ("model_type", K3_BLOCK_SIZE, "auto_map")}
    frequency, layers = text.get("moe_layer_freq", 1), text.get("num_hidden_layers")
    if frequency != 1 and isinstance(layers, int) and isinstance(frequency, int) and frequency > 1:
        first = text.get("first_k_dense_replace", 1)
        options["mlp_layer_types"] = [
            "sparse" if layer >= first and layer % frequency == 0 else "dense" for layer in range(layers)
        ]
    backbone = AutoConfig.for_model(text["model_type"], **options)
    return AttnResConfig(
        backbone_config=backbone, residual_mode="block", layers_per_block=text[K3_BLOCK_SIZE], dtype=backbone.dtype
    )


def to_k3(config: AttnResConfig) -> dict:
    """The Kimi K3-style `config.json` of an AttnRes model with a Kimi Linear backbone."""
    backbone = config.backbone_config
    if backbone.model_type != "kimi_linear":
        raise CheckpointError(f"--to kimi-k3 needs a kimi_linear backbone, got {backbone.model_type}.")
    if config.residual_mode != "block":
        raise CheckpointError(f"--to kimi-k3 needs residual_mode block, got {config.residual_mode}.")
    dense = sum(kind == "dense" for kind in backbone.mlp_layer_types)
    if backbone.mlp_layer_types != ["dense"] * dense + ["sparse"] * (backbone.num_hidden_layers - dense):
        raise CheckpointError(
            "--to kimi-k3 needs all dense layers first (first_k_dense_replace), mlp_layer_types has others."
        )

    def layers_of(kind: str) -> list[int]:
        return [layer for layer, found in enumerate(backbone.layer_types, 1) if found == kind]

    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        K3_BLOCK_SIZE: config.layers_per_block,
        **{key: getattr(backbone, key) for key in K3_KEYS},
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "linear_attn_config": {
            "full_attn_layers": layers_of("full_attention"),
            "kda_layers": layers_of("linear_attention"),
            "head_dim": backbone.linear_head_dim,
            "num_heads": backbone.linear_num_heads,
            "short_conv_kernel_size": backbone.linear_conv_kernel_dim,
        },
        **({"dtype": str(config.dtype).removeprefix("torch.")} if config.dtype is not None else {}),
    }


def to_prenorm(config: AttnResConfig) -> dict:
    """The `config.json` of the plain backbone."""
    backbone: PreTrainedConfig = config.backbone_config
    content = backbone.to_diff_dict()
    content["model_type"] = backbone.model_type
    content.pop("auto_map", None)  # names code that does not come along
    if config.dtype is not None:
        content["dtype"] = str(config.dtype).removeprefix("torch.")
    return content


def shape_in(layout: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has in a layout: the KDA decay rates are [heads] in K3, [1, 1, heads, 1] elsewhere."""
    if not name.endswith(".self_attn.A_log"):
        return shape
    heads = max(shape, default=1)
    return (heads,) if layout == KIMI_K3 else (1, 1, heads, 1)


def _look_up(config: dict, path: str):
    value = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
