"""The configuration of an AttnRes model: a backbone's configuration and the depth options."""

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

# The paper's model, Kimi Linear 48B-A3B (section 5). The released checkpoint has full attention in other layers than
# transformers' defaults; layers are counted from 1 here.
DEFAULT_BACKBONE = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 27,
    "layer_types": [
        "full_attention" if layer in (4, 8, 12, 16, 20, 24, 27) else "linear_attention" for layer in range(1, 28)
    ],
    "mlp_layer_types": ["dense"] + ["sparse"] * 26,
}
DEFAULT_BACKBONE_LAYERS_PER_BLOCK = 3

# PreTrainedModel sets these on its own configuration, but the backbone's modules read them from the backbone's.
_PROPAGATED = ("_attn_implementation_internal", "_experts_implementation_internal")
# These describe the whole checkpoint and are never read from the backbone's configuration.
_ROOT_ONLY = ("auto_map", "quantization_config")
# These describe the task of a head.
_TASK = ("id2label", "label2id", "problem_type")
# These are set for the duration of a forward pass, and the masks read them from the backbone's configuration.
_BACKBONE_ONLY = ("is_causal",)


def _plan(name: str) -> property:
    """Returns a property that reads a parallel plan of the backbone."""
    return property(lambda config: getattr(config.backbone_config, name, None))


class AttnResConfig(PreTrainedConfig):
    r"""The configuration of an AttnRes model: its backbone, and how sublayer outputs are mixed over depth.

    Attributes that only the backbone has (`hidden_size`, `vocab_size`, `num_hidden_layers`, `pad_token_id`, ...) are
    read from and written to `backbone_config`, so that code for a plain transformers configuration works.

    Args:
        backbone_config (`PreTrainedConfig` or `dict` with a `model_type`, *optional*):
            Configuration of a supported PreNorm family (see `attnres.backbones.FAMILIES`). The default is the paper's
            model, Kimi Linear 48B-A3B.
        residual_mode (`str`, defaults to `"block"`):
            The sources of a sublayer. `"block"`: the embedding, the sums of complete blocks and the partial sum of the
            current block (paper, section 3.2). `"full"`: the embedding and all earlier sublayer outputs (section 3.1).
            `"standard"`: none; the model has plain PreNorm residuals, as a baseline in the same code.
        layers_per_block (`int`, *optional*):
            The number of decoder layers (attention and MLP) per block in `"block"` mode, from 1 to `num_hidden_layers`;
            the last block may be shorter. The paper's S counts sublayers: S=6 is `layers_per_block=3`. The default is 3
            for the default backbone, and otherwise what makes at most 8 blocks.
        num_blocks (`int`, *optional*):
            Sets `layers_per_block = ceil(num_hidden_layers / num_blocks)` and is not stored. There are at most this
            many blocks: with `num_blocks=8`, 28 layers make 7 blocks of 4.
        depth_variant (`str`, defaults to `"attnres"`):
            The way of mixing, a key of `attnres.depth_variants.VARIANTS`. `"attnres"` is the paper's; the others are
            its ablations and related methods (docs/variants.md).
        scale_norm_eps (`bool`, defaults to `False`):
            Whether a mixture of n sources is multiplied by n, which divides the epsilon of the RMSNorm that follows by
            n^2. While the pseudo-queries are zero, a converted model then computes the same function as the plain
            model. Conversions set it to `True` (`from_backbone`, `from_pretrained` with a plain checkpoint,
            `attnres convert`).
        depth_implementation (`str`, defaults to `"auto"`):
            The implementation of the mixing: `"eager"` (the equation in torch), `"triton"`, or `"auto"`, which uses
            fused kernels where they are installed and pass a self-check (Triton on CUDA, numba on CPUs) and eager
            elsewhere. It is not stored.

    Raises:
        ValueError: the backbone is not supported, or a depth option is out of range.
    """

    # Not @strict, whose type errors are several lines long and suggest no fix: see check_depth_options.
    model_type = "attnres"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "depth_weights"]

    backbone_config: dict | PreTrainedConfig | None = None
    residual_mode: str = "block"
    layers_per_block: int | None = None
    depth_variant: str = "attnres"
    scale_norm_eps: bool = False

    base_model_tp_plan = _plan("base_model_tp_plan")
    base_model_ep_plan = _plan("base_model_ep_plan")
    base_model_pp_plan = _plan("base_model_pp_plan")
    base_model_fsdp_plan = _plan("base_model_fsdp_plan")

    def __post_init__(self, **kwargs):
        num_blocks = kwargs.pop("num_blocks", None)
        depth_implementation = kwargs.pop("depth_implementation", "auto")
        # transformers builds a default configuration to compare others with, which is not that of any model.
        self._is_default = self.backbone_config is None
        backbone = _as_config(self.backbone_config)
        for key, value in sizes(backbone).items():  # `to_dict` repeats them
            if kwargs.get(key) == value:
                del kwargs[key]
        if self.backbone_config is None and self.layers_per_block is None and num_blocks is None:
            self.layers_per_block = DEFAULT_BACKBONE_LAYERS_PER_BLOCK
        check_supported(backbone)
        # The base class would convert the backbone's rope parameters, so it runs before the backbone is attached.
        self.backbone_config = None
        super().__post_init__(**kwargs)
        self.backbone_config = backbone
        for name in _PROPAGATED:  # an implementation set on either configuration applies to both
            own, inherited = self.__dict__.get(name), getattr(backbone, name, None)
            setattr(self, name, inherited if own is None else own)
        self.layers_per_block = _resolve_layers_per_block(self.layers_per_block, num_blocks, self.num_hidden_layers)
        self.depth_implementation = depth_implementation
        self.check_depth_options()

    @classmethod
    def from_backbone(cls, config: PreTrainedConfig, **depth_options) -> "AttnResConfig":
        """Returns the configuration of the lossless conversion of a plain model.

        Args:
            config: configuration of the plain model, of a supported family; it is copied.
            depth_options: `residual_mode`, `layers_per_block`, `num_blocks`, `depth_variant`, `depth_implementation`,
                and `scale_norm_eps`, which is `True` by default here.

        Raises:
            ValueError: the configuration is an `AttnResConfig`, its family is not supported, or an option is unknown or
                out of range.
        """
        if isinstance(config, AttnResConfig):
            raise ValueError(
                "from_backbone needs the configuration of a plain model, got an AttnResConfig; "
                "pass config.backbone_config to start again from its backbone."
            )
        unknown = set(depth_options) - set(DEPTH_OPTIONS) - {"depth_implementation"}
        if unknown:
            raise ValueError(
                f"unknown depth option {sorted(unknown)[0]!r}; known: {', '.join(DEPTH_OPTIONS)}. "
                "Loading options, such as dtype, need a folder or a hub id instead of a model in memory."
            )
        depth_options = {"scale_norm_eps": True, **depth_options}
        task = {key: getattr(config, key) for key in _TASK if getattr(config, key, None) is not None}
        return cls(backbone_config=deepcopy(config), dtype=config.dtype, **task, **depth_options)

    @classmethod
    def kimi_k3(cls, **depth_options) -> "AttnResConfig":
        """Returns the configuration of Kimi K3's text model: 2.78 T parameters, blocks of 12 decoder layers.

        Args:
            depth_options: the options of `from_backbone`.
        """
        if not {"layers_per_block", "num_blocks"} & set(depth_options):
            depth_options["layers_per_block"] = KIMI_K3_LAYERS_PER_BLOCK
        return cls.from_backbone(_as_config(KIMI_K3), **depth_options)

    @property
    def num_blocks(self) -> int:
        """The number of blocks in `"block"` mode, not counting the embedding."""
        return ceil(self.num_hidden_layers / self.layers_per_block)

    @num_blocks.setter
    def num_blocks(self, value: int):
        self.layers_per_block = _resolve_layers_per_block(None, value, self.num_hidden_layers)

    @property
    def num_sublayers(self) -> int:
        """The number of sublayers (the paper's L): an attention and an MLP per decoder layer."""
        return 2 * self.num_hidden_layers

    @property
    def num_hidden_states(self) -> int:
        """The number of tensors in `hidden_states`: the input of each decoder layer, and the final normed state."""
        return self.num_hidden_layers + 1

    @property
    def depth_implementation(self) -> str:
        """The implementation of the mixing over depth."""
        return self._depth_implementation_internal

    @depth_implementation.setter
    def depth_implementation(self, value: str | None):
        value = "auto" if value is None else value
        if value not in DEPTH_IMPLEMENTATIONS:
            raise ValueError(f"depth_implementation must be one of {sorted(DEPTH_IMPLEMENTATIONS)}, got {value!r}.")
        self._depth_implementation_internal = value

    def check_depth_options(self):
        """Checks the depth options."""
        if self.residual_mode not in RESIDUAL_MODES:
            raise ValueError(f"residual_mode must be one of {', '.join(RESIDUAL_MODES)}, got {self.residual_mode!r}.")
        if not isinstance(self.scale_norm_eps, bool):
            raise ValueError(f"scale_norm_eps must be true or false, got {self.scale_norm_eps!r}.")
        check_variant(self.depth_variant, self.hidden_size)
        layers, value = self.num_hidden_layers, self.layers_per_block
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= layers:
            raise ValueError(
                f"layers_per_block must be between 1 and num_hidden_layers={layers}, got {value!r}. "
                "It counts decoder layers (attention and MLP); the paper's S counts sublayers, so S=6 is "
                "layers_per_block=3."
            )

    @property
    def _attn_implementation(self):
        """The backbone's attention implementation, which its modules read and which serving engines set there."""
        backbone = self.__dict__.get("backbone_config")
        return (self if backbone is None else backbone)._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        PreTrainedConfig._attn_implementation.fset(self, value)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Returns the backbone's configuration, which caches, masks, generation and parallel plans read."""
        return self if self.__dict__.get("backbone_config") is None else self.backbone_config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json`, and turns that of a plain model into the one of its lossless conversion."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _wrap_backbone(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Builds a configuration from a dictionary; depth options in `kwargs` replace those in the dictionary."""
        config_dict = dict(_wrap_backbone(config_dict))
        overrides = {key: kwargs.pop(key) for key in (*DEPTH_OPTIONS, "depth_implementation") if key in kwargs}
        if overrides.get("num_blocks") is not None and "layers_per_block" not in overrides:
            config_dict.pop("layers_per_block", None)  # replaced by the caller's num_blocks
        config_dict.update(overrides)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a dictionary, with the backbone's sizes at the top level for other libraries.

        It leaves out an `auto_map` that points to code in the same folder. The file has it, so that a configuration
        equals itself after saving and loading.
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
        """Returns the contents of `config.json`."""
        content = {key: value for key, value in super().to_diff_dict().items() if key not in SIZES}
        # transformers writes the names of the classes, which FSDP prefixes with its own name.
        auto_map = {
            key: str(place).replace(".FSDP", ".") for key, place in (self.__dict__.get("auto_map") or {}).items()
        }
        return {**content, **({"auto_map": auto_map} if auto_map else {})}

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        d.pop("_depth_implementation_internal", None)
        d.pop("_is_default", None)
        if isinstance(d.get("backbone_config"), dict):
            d["backbone_config"].pop("_name_or_path", None)  # a local path is private
            d["backbone_config"].pop("auto_map", None)  # refers to the code of the plain model, which is not used
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
            "backbone_config must be a transformers configuration or a dict with a model_type, "
            f"got {type(backbone).__name__}."
        )
    options = {key: value for key, value in backbone.items() if key != "model_type"}
    check_supported(backbone["model_type"])
    return AutoConfig.for_model(backbone["model_type"], **options)


def _wrap_backbone(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns an AttnRes configuration unchanged, and wraps that of a plain model as the `backbone_config` of one."""
    if config_dict.get("model_type", AttnResConfig.model_type) == AttnResConfig.model_type:
        if config_dict.get("backbone_config") is None:
            raise ValueError("backbone_config is missing: the configuration file of an attnres model must contain it.")
        return config_dict
    if "attn_res_block_size" in config_dict.get("text_config", config_dict):
        raise ValueError(
            "attn_res_block_size: this checkpoint is in the Kimi K3 layout; convert it with "
            "`attnres convert SRC DST --from kimi-k3` before loading it."
        )
    backbone = dict(config_dict)
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
            f"{layers} decoder layers have {resolved} layers each. Give one of the two."
        )
    return resolved


__all__ = ["AttnResConfig"]
