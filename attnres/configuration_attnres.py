"""Configuration of an AttnRes model: a transformers backbone configuration plus the depth options."""

from copy import deepcopy
from math import ceil
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .backbones import check_supported
from .client_tables import SIZES, offer_backbone_defaults, sizes
from .configuration_kimi_k3 import KIMI_K3, KIMI_K3_LAYERS_PER_BLOCK
from .depth_kernels import DEPTH_IMPLEMENTATIONS
from .depth_variants import check_variant

RESIDUAL_MODES = ("block", "full", "standard")
DEPTH_OPTIONS = ("residual_mode", "layers_per_block", "num_blocks", "depth_variant", "scale_norm_eps")
DEFAULT_NUM_BLOCKS = 8

# The paper's model (section 5): Kimi Linear 48B-A3B. transformers' own defaults put the full-attention layers
# elsewhere than the released checkpoint does, so the schedule is spelled out (layers counted from 1).
DEFAULT_BACKBONE = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 27,
    "layer_types": [
        "full_attention" if layer in (4, 8, 12, 16, 20, 24, 27) else "linear_attention" for layer in range(1, 28)
    ],
    "mlp_layer_types": ["dense"] + ["sparse"] * 26,
}
DEFAULT_BACKBONE_LAYERS_PER_BLOCK = 3

# Written by PreTrainedModel on its own config only; the backbone's modules read them from the backbone config.
_PROPAGATED = ("_attn_implementation_internal", "_experts_implementation_internal")
# What concerns the whole checkpoint, whatever the backbone's own configuration says.
_ROOT_ONLY = ("auto_map", "quantization_config")
# What a head is made for.
_TASK = ("id2label", "label2id", "problem_type")
# Set for the time of a forward pass, and read by the masks from the backbone config.
_BACKBONE_ONLY = ("is_causal",)


class AttnResConfig(PreTrainedConfig):
    r"""Describes an AttnRes model: which backbone, and how the outputs of its sublayers are mixed over depth.

    Attributes that are not found here are read from and written to `backbone_config` (`hidden_size`, `vocab_size`,
    `num_hidden_layers`, `max_position_embeddings`, `pad_token_id`, `use_cache`, ...), so code written for a plain
    transformers configuration works.

    Args:
        backbone_config (`PreTrainedConfig` or `dict` with a `model_type`, *optional*):
            Configuration of a supported PreNorm family (see `attnres.backbones.FAMILIES`). Default: the paper's
            48B-A3B Kimi Linear.
        residual_mode (`str`, defaults to `"block"`):
            `"block"`: sublayers attend over the embedding, the sums of completed blocks and the partial sum of the
            current block (paper, section 3.2). `"full"`: over all earlier sublayer outputs (section 3.1).
            `"standard"`: the plain PreNorm residual in the same code, the baseline.
        layers_per_block (`int`, *optional*):
            Decoder layers (attention + MLP) per block, 1 to `num_hidden_layers`; the last block is the short one. The
            paper's S counts sublayers: S=6 is `layers_per_block=3`. Read only in `"block"` mode. Default: 3 for the
            default backbone, otherwise 8 blocks.
        num_blocks (`int`, *optional*):
            Convenience: turned into `layers_per_block = ceil(num_hidden_layers / num_blocks)` and not stored; it makes
            at most this many blocks (28 layers in 8 blocks: 4 layers each, 7 blocks).
        depth_variant (`str`, defaults to `"attnres"`):
            What is mixed how, a key of `attnres.depth_variants.VARIANTS`: `"attnres"` is the paper's, the others are
            its ablations, rivals and proposals of others (docs/variants.md).
        scale_norm_eps (`bool`, defaults to `False`):
            Whether the RMSNorm after a mixture of n sources has the epsilon `rms_norm_eps / n**2`: the mixture is
            multiplied by n, which makes it the sum of its sources while pseudo-queries are zero. A conversion then
            computes what the plain model computed, epsilon included. `True` for everything that is converted
            (`from_backbone`, a plain checkpoint in `from_pretrained`, `attnres convert`).
        depth_implementation (`str`, defaults to `"auto"`):
            Which implementation mixes: `"eager"`, the formula in torch; `"triton"`; or `"auto"`, fused kernels where
            they are installed and pass a self-check (Triton on CUDA, numba on CPUs), otherwise eager. Not stored.

    Raises:
        ValueError: an unsupported backbone, or a depth option out of range; names the field, the value and the rule.
    """

    # Not @strict: its type errors are several lines long and name no fix; check_depth_options does it in one.
    model_type = "attnres"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "depth_weights"]

    backbone_config: dict | PreTrainedConfig | None = None
    residual_mode: str = "block"
    layers_per_block: int | None = None
    depth_variant: str = "attnres"
    scale_norm_eps: bool = False

    def __post_init__(self, **kwargs):
        num_blocks = kwargs.pop("num_blocks", None)
        depth_implementation = kwargs.pop("depth_implementation", "auto")
        # transformers makes one to compare with: nobody's model has its backbone.
        self._is_default = self.backbone_config is None
        backbone = _as_config(self.backbone_config)
        for key, value in sizes(backbone).items():  # which `to_dict` repeats
            if kwargs.get(key) == value:
                del kwargs[key]
        if self.backbone_config is None and self.layers_per_block is None and num_blocks is None:
            self.layers_per_block = DEFAULT_BACKBONE_LAYERS_PER_BLOCK
        check_supported(backbone)
        # The base class initialises sub-configurations in its own way and would convert delegated rope parameters:
        # it runs without a backbone, which is attached afterwards.
        self.backbone_config = None
        super().__post_init__(**kwargs)
        self.backbone_config = backbone
        for name in _PROPAGATED:  # an implementation chosen on either of the two holds for both
            own, inherited = self.__dict__.get(name), getattr(backbone, name, None)
            setattr(self, name, inherited if own is None else own)
        self.layers_per_block = _resolve_layers_per_block(self.layers_per_block, num_blocks, self.num_hidden_layers)
        self.depth_implementation = depth_implementation
        self.check_depth_options()

    @classmethod
    def from_backbone(cls, config: PreTrainedConfig, **depth_options) -> "AttnResConfig":
        """The configuration of the lossless conversion of a plain model with this configuration.

        Args:
            config: configuration of a supported family; it is copied.
            depth_options: `residual_mode`, `layers_per_block`, `num_blocks`, `depth_variant`, `scale_norm_eps` (here
                `True` by default).
        """
        if isinstance(config, AttnResConfig):
            raise ValueError(
                "from_backbone needs the configuration of a plain backbone, got an AttnResConfig. "
                "Pass config.backbone_config to start over from its backbone."
            )
        unknown = set(depth_options) - set(DEPTH_OPTIONS) - {"depth_implementation"}
        if unknown:
            raise ValueError(
                f"unknown depth option {sorted(unknown)[0]!r}; known: {', '.join(DEPTH_OPTIONS)}. "
                "Options of loading, such as dtype, go with a folder or hub id, not with a model in memory."
            )
        depth_options = {"scale_norm_eps": True, **depth_options}
        task = {key: getattr(config, key) for key in _TASK if getattr(config, key, None) is not None}
        return cls(backbone_config=deepcopy(config), dtype=config.dtype, **task, **depth_options)

    @classmethod
    def kimi_k3(cls, **depth_options) -> "AttnResConfig":
        """The configuration of Kimi K3's text model: 2.78 T parameters, blocks of 12 decoder layers.

        Args:
            depth_options: `residual_mode`, `layers_per_block`, `num_blocks`.
        """
        if not {"layers_per_block", "num_blocks"} & set(depth_options):
            depth_options["layers_per_block"] = KIMI_K3_LAYERS_PER_BLOCK
        return cls.from_backbone(_as_config(KIMI_K3), **depth_options)

    @property
    def num_blocks(self) -> int:
        """Number of blocks in `"block"` mode, without the embedding, which is a block of its own."""
        return ceil(self.num_hidden_layers / self.layers_per_block)

    @num_blocks.setter
    def num_blocks(self, value: int):
        self.layers_per_block = _resolve_layers_per_block(None, value, self.num_hidden_layers)

    @property
    def num_sublayers(self) -> int:
        """Sublayers of the model, the paper's L: an attention and an MLP per decoder layer."""
        return 2 * self.num_hidden_layers

    @property
    def num_hidden_states(self) -> int:
        """Tensors in `hidden_states`: what each decoder layer received, and the final normed state."""
        return self.num_hidden_layers + 1

    @property
    def depth_implementation(self) -> str:
        """Which implementation mixes over depth."""
        return self._depth_implementation_internal

    @depth_implementation.setter
    def depth_implementation(self, value: str | None):
        value = "auto" if value is None else value
        if value not in DEPTH_IMPLEMENTATIONS:
            raise ValueError(f"depth_implementation must be one of {sorted(DEPTH_IMPLEMENTATIONS)}, got {value!r}.")
        self._depth_implementation_internal = value

    def check_depth_options(self):
        """Raises ValueError if a depth option does not fit the backbone."""
        if self.residual_mode not in RESIDUAL_MODES:
            raise ValueError(f"residual_mode must be one of {', '.join(RESIDUAL_MODES)}, got {self.residual_mode!r}.")
        if not isinstance(self.scale_norm_eps, bool):
            raise ValueError(f"scale_norm_eps must be true or false, got {self.scale_norm_eps!r}.")
        check_variant(self.depth_variant, self.hidden_size)
        layers, value = self.num_hidden_layers, self.layers_per_block
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= layers:
            raise ValueError(
                f"layers_per_block must be between 1 and num_hidden_layers={layers}, got {value!r}. "
                "It counts decoder layers (attention + MLP); the paper's S counts sublayers, so S=6 is "
                "layers_per_block=3."
            )

    @property
    def _attn_implementation(self):
        """The backbone's, whose modules read it: engines set it on what `get_text_config` gives them."""
        backbone = self.__dict__.get("backbone_config")
        return (self if backbone is None else backbone)._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        PreTrainedConfig._attn_implementation.fset(self, value)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The backbone configuration: caches, masks, generation and parallel plans read this one."""
        return self if self.__dict__.get("backbone_config") is None else self.backbone_config

    @property
    def base_model_tp_plan(self):
        return self.backbone_config.base_model_tp_plan

    @property
    def base_model_ep_plan(self):
        return getattr(self.backbone_config, "base_model_ep_plan", None)

    @property
    def base_model_pp_plan(self):
        return self.backbone_config.base_model_pp_plan

    @property
    def base_model_fsdp_plan(self):
        return getattr(self.backbone_config, "base_model_fsdp_plan", None)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json`; that of a plain backbone becomes the configuration of its lossless conversion."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _wrap_backbone(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = dict(_wrap_backbone(config_dict))
        overrides = {key: kwargs.pop(key) for key in (*DEPTH_OPTIONS, "depth_implementation") if key in kwargs}
        if overrides.get("num_blocks") is not None and "layers_per_block" not in overrides:
            config_dict.pop("layers_per_block", None)  # the caller's block size replaces the stored one
        config_dict.update(overrides)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As of any configuration, with the backbone's sizes, which clients look for at the top.

        Where its code lies beside it in a folder (`auto_map`) is a matter of the folder: it is in the file, and a
        configuration equals itself after saving and loading.
        """
        content = super().to_dict()
        if isinstance(backbone := self.__dict__.get("backbone_config"), PreTrainedConfig):
            content.update(sizes(backbone))
            if not self.__dict__.get("_is_default"):
                offer_backbone_defaults(self.model_type, backbone.model_type)
        if not any("--" in str(place) for place in (content.get("auto_map") or {}).values()):
            content.pop("auto_map", None)
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """What the file holds."""
        content = {key: value for key, value in super().to_diff_dict().items() if key not in SIZES}
        # transformers takes the names from the classes, and FSDP puts its own before those.
        auto_map = {
            key: str(place).replace(".FSDP", ".") for key, place in (self.__dict__.get("auto_map") or {}).items()
        }
        return {**content, **({"auto_map": auto_map} if auto_map else {})}

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        d.pop("_depth_implementation_internal", None)
        d.pop("_is_default", None)
        if isinstance(d.get("backbone_config"), dict):
            d["backbone_config"].pop("_name_or_path", None)  # a local path is nobody else's business
            d["backbone_config"].pop("auto_map", None)  # the code of a plain model, which is not used
        super()._remove_keys_not_serialized(d)

    def __getattr__(self, name: str):
        backbone = self.__dict__.get("backbone_config")
        if backbone is None or isinstance(backbone, dict) or name.startswith("_") or name in _ROOT_ONLY:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(backbone, name)

    def __setattr__(self, name: str, value):
        backbone = self.__dict__.get("backbone_config")
        if isinstance(backbone, PreTrainedConfig):
            if name in _PROPAGATED:
                setattr(backbone, name, value)
            elif name in _BACKBONE_ONLY or (
                not name.startswith("_")
                and name not in _ROOT_ONLY
                and not hasattr(type(self), name)
                and hasattr(backbone, name)
            ):
                setattr(backbone, name, value)
                return
        super().__setattr__(name, value)

    def __delattr__(self, name: str):
        if name in _BACKBONE_ONLY:
            delattr(self.backbone_config, name)
        else:
            super().__delattr__(name)


def _as_config(backbone) -> PreTrainedConfig:
    if backbone is None:
        backbone = DEFAULT_BACKBONE
    if isinstance(backbone, PreTrainedConfig):
        return backbone
    if not isinstance(backbone, dict) or not isinstance(backbone.get("model_type"), str):
        raise ValueError(
            "backbone_config must be a transformers configuration or a dict with its model_type, "
            f"got {type(backbone).__name__}."
        )
    options = {key: value for key, value in backbone.items() if key != "model_type"}
    check_supported(backbone["model_type"])
    return AutoConfig.for_model(backbone["model_type"], **options)


def _wrap_backbone(config_dict: dict[str, Any]) -> dict[str, Any]:
    """An AttnRes configuration as it is, that of a plain backbone as the `backbone_config` of one."""
    if config_dict.get("model_type", AttnResConfig.model_type) == AttnResConfig.model_type:
        if config_dict.get("backbone_config") is None:
            raise ValueError("backbone_config is missing: an attnres configuration file must say what its backbone is.")
        return config_dict
    if "attn_res_block_size" in config_dict.get("text_config", config_dict):
        raise ValueError(
            "attn_res_block_size: this is a checkpoint in the Kimi K3 layout, which loads after "
            "`attnres convert SRC DST --from kimi-k3`."
        )
    backbone = dict(config_dict)
    # What concerns the whole checkpoint is read from the root configuration.
    root = {key: backbone.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in backbone}
    root |= {key: backbone[key] for key in _TASK if key in backbone}
    return {"model_type": AttnResConfig.model_type, "backbone_config": backbone, "scale_norm_eps": True, **root}


def _resolve_layers_per_block(layers_per_block: int | None, num_blocks: int | None, layers: int) -> int:
    if num_blocks is None:
        return ceil(layers / DEFAULT_NUM_BLOCKS) if layers_per_block is None else layers_per_block
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 1 <= num_blocks <= layers:
        raise ValueError(
            f"num_blocks must be a whole number between 1 and num_hidden_layers={layers}, got {num_blocks!r}."
        )
    resolved = ceil(layers / num_blocks)
    if layers_per_block is not None and layers_per_block != resolved:
        raise ValueError(
            f"layers_per_block={layers_per_block} and num_blocks={num_blocks} disagree: {num_blocks} blocks of "
            f"{layers} decoder layers are {resolved} layers per block. Give one of the two."
        )
    return resolved


__all__ = ["AttnResConfig"]
