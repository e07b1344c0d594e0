"""AttnRes models: transformers backbones whose residual additions are replaced by mixtures over depth.

Embeddings, sublayers, norms, rotary embeddings, masks and caches are the family's own modules under their own names.
Only the `depth_mixer` is added.

Shapes: B batch, T tokens, D hidden size, V vocabulary, L decoder layers, n sources.
"""

import copy
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbones import (
    build_base_model,
    build_lm_head,
    causal_lm_class,
    create_masks,
    get_family,
    init_weights,
    load_balancing_loss,
    rotary_inputs,
    scale_logits,
    types_of_layers,
)
from .checkpoint_names import PER_LAYER_NAMES, names_in_memory, weight_conversions
from .configuration_attnres import DEPTH_OPTIONS, AttnResConfig
from .decoder_layer import (
    AttnResDecoderLayer,
    DepthWeights,
    LayerQueries,
    MixedInput,
    SublayerWeights,
    is_hooked,
    norm_to_fuse,
)
from .depth_mixer import DepthMixer, DepthScore, DepthState, Mixing, VariantParameters
from .depth_variants import VARIANTS

# Held while converters are registered and while a model is loaded with them.
_CONVERSIONS = threading.RLock()

logger = logging.get_logger(__name__)

# Attributes of a family's class that an AttnRes model of that family copies.
_FAMILY_TRAITS = (
    "_supports_flash_attn",
    "_supports_sdpa",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_supports_context_parallel",
    "_compatible_flash_implementations",
    "_can_compile_fullgraph",
    "_is_stateful",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_can_set_experts_implementation",
)

# The quantisation format whose packed weights can be converted but not loaded.
PACKED = "mxfp4-pack-quantized"

# The heads of the different tasks. A checkpoint of another task has another head.
HEADS = ("lm_head.", "score.", "qa_outputs.")

# The classes in the code of a saved folder.
AUTO_MAP = {
    "AutoConfig": "configuration_attnres.AttnResConfig",
    "AutoModel": "modeling_attnres.AttnResModel",
    "AutoModelForCausalLM": "modeling_attnres.AttnResForCausalLM",
    "AutoModelForSequenceClassification": "modeling_attnres.AttnResForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_attnres.AttnResForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_attnres.AttnResForQuestionAnswering",
}


@dataclass
class AttnResModelOutputWithPast(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast` with `depth_weights`: 2 L + 1 tensors `[B, T, n]`, float32, rows summing to 1."""

    depth_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` with `depth_weights`: 2 L + 1 tensors `[B, T, n]`, float32, rows summing to 1."""

    depth_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HiddenStatesRecorder(OutputRecorder):
    """Records L + 1 hidden states, so that negative indices in `output_hidden_states` count back from the last."""

    num_hidden_layers_key: str = "num_hidden_states"


Model = TypeVar("Model", bound="AttnResPreTrainedModel")


class AttnResPreTrainedModel(PreTrainedModel):
    """Loading, saving, conversion and initialisation, which all AttnRes models share."""

    config: AttnResConfig
    config_class = AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttnResDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Defaults of the class; a model has the values of its family.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HiddenStatesRecorder(MixedInput, index=0, capture_initial_hidden_state=False),
        "attentions": OutputRecorder(SublayerWeights, index=0),
        "depth_weights": OutputRecorder(DepthWeights, index=0),
        # The routers of all families, by their names: recorders are registered for classes, not for families.
        "router_logits": [
            OutputRecorder(None, index=0, class_name=place)
            for place in (".mlp.gate", ".mlp.router", ".block_sparse_moe.router")
        ],
    }

    def __init__(self, config: AttnResConfig, *inputs, **kwargs):
        config.check_depth_options()  # options may have been changed after construction
        family_class = causal_lm_class(config.backbone_config)
        for name in _FAMILY_TRAITS:
            if hasattr(family_class, name):
                object.__setattr__(self, name, copy.copy(getattr(family_class, name)))
        super().__init__(config, *inputs, **kwargs)
        self._register_conversions()

    def _register_conversions(self):
        """Registers the converters of this model's family with transformers.

        transformers looks them up by class and `model_type`, which all families share, so only the last registration
        counts. The lock keeps other threads from registering while a model is loaded.
        """
        with _CONVERSIONS:
            conversions = weight_conversions(self.config)
            register_checkpoint_conversion_mapping(self.config.model_type, conversions, overwrite=True)

    @property
    def _weight_conversions(self) -> list:
        """The converters that saving reverts: always those of this model's family."""
        return weight_conversions(self.config)

    @_weight_conversions.setter
    def _weight_conversions(self, used: list):
        """Ignores the converters that loading used, which lack those of depth tensors for a plain checkpoint."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False  # the class can have any backbone; a model copies the method of its family

    def __init_subclass__(cls, **kwargs):
        """Moves the class that FSDP derives from a model's class to the same module, whose code is saved."""
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0].__name__ == "FSDPModule":
            cls.__module__ = cls.__bases__[1].__module__

    def _get_name(self) -> str:
        """Returns the class's name without FSDP's prefix, as Trainer decides by the name whether to shift labels."""
        return super()._get_name().removeprefix("FSDP")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DepthScore):
            init.zeros_(module.query)
            init.ones_(module.weight)
        elif isinstance(module, VariantParameters):
            init.copy_(module.weight, module.initial())
        elif not isinstance(module, DepthMixer):
            init_weights(self.config.backbone_config, module)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves weights, configuration and code; depth tensors are stored per layer, under the names of Kimi K3.

        Args:
            save_directory, kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: decoder layers were removed, but they are not the last ones or `num_hidden_layers` counts them.
        """
        if self.is_remote_code():
            self.config.auto_map = dict(AUTO_MAP)
        self.config.check_depth_options()
        cut = self._state_of_cut_model(kwargs.get("state_dict"))
        return super().save_pretrained(save_directory, **({**kwargs, "state_dict": cut} if cut else kwargs))

    def _state_of_cut_model(self, state_dict: dict | None) -> dict | None:
        """Returns the state dict of a model whose last layers were removed, without the pseudo-queries of these layers.

        Returns `None` if no layers were removed.
        """
        base = self.base_model
        mixer, layers = base.depth_mixer, base.layers
        if mixer is None or len(layers) == self.config.num_hidden_layers == len(mixer.mlp_norm.weight):
            return None
        indices = _indices(layers)
        if indices != list(range(self.config.num_hidden_layers)) or mixer.variant_norm is not None:
            raise ValueError(
                f"num_hidden_layers={self.config.num_hidden_layers}, but the model has the decoder layers {indices}: "
                "only the last layers of a model can be removed; set num_hidden_layers to the number of those left."
            )
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        prefix = "" if base is self else f"{self.base_model_prefix}."
        for name in PER_LAYER_NAMES.values():
            name = f"{prefix}depth_mixer.{name}"
            state_dict[name] = state_dict[name][: len(layers)]
        return state_dict

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        names = {name for name, _ in self.named_parameters()}
        depth_names = {name for name in names if _is_depth_name(name)}
        # A plain checkpoint lacks all depth tensors, whose initial values make the conversion lossless.
        if depth_names <= loading_info.missing_keys and not names <= loading_info.missing_keys:
            loading_info.missing_keys -= depth_names
            _warn_if_lossy(self.config)
        loading_info.unexpected_keys = {  # heads for other tasks
            name for name in loading_info.unexpected_keys if not name.startswith(HEADS) or hasattr(self, "lm_head")
        }

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Loads a state dict, also one with the names on disk (one tensor per layer and expert), as Trainer does."""
        if not state_dict.keys() <= self.state_dict().keys():
            state_dict = names_in_memory(self, state_dict, partial=not strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def load_adapter(self, *args, **kwargs):
        """Loads a PEFT adapter as in transformers, with the converters of this model's family."""
        with _CONVERSIONS:
            self._register_conversions()
            return super().load_adapter(*args, **kwargs)

    def depth_parameters(self) -> Iterator[nn.Parameter]:
        """Iterates over the depth mixer's parameters: pseudo-queries and key-norm gains, none in "standard" mode."""
        return (parameter for name, parameter in self.named_parameters() if _is_depth_name(name))

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Iterates over all parameters except those of the depth mixer."""
        return (parameter for name, parameter in self.named_parameters() if not _is_depth_name(name))

    def freeze_backbone(self: Model) -> Model:
        """Makes only the depth mixer trainable, and returns the model."""
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(False)
        return self

    def set_depth_implementation(self, depth_implementation: str) -> None:
        """Sets the implementation of the mixing over depth: "auto", "eager" or "triton" (see `AttnResConfig`)."""
        self.config.depth_implementation = depth_implementation

    @classmethod
    def from_backbone(cls: type[Model], model_or_path: PreTrainedModel | str | os.PathLike, **kwargs: Any) -> Model:
        """Converts a PreNorm model losslessly: with zero pseudo-queries it computes what the plain model computes.

        Args:
            model_or_path: a transformers model in memory, a local folder or a hub id. The family must be supported. The
                weights of a model in memory are copied, and the model is not changed. A head that it does not have is
                newly initialised, with a warning.
            kwargs: depth options (`residual_mode`, `layers_per_block`, `num_blocks`, `depth_variant`,
                `scale_norm_eps`) and, with a path, any option of `from_pretrained`, including `gguf_file`.

        Raises:
            ValueError: the family is not supported, the model is an AttnRes model already, a PEFT model or sharded, or
                its weights are packed by a quantisation.
        """
        if hasattr(model_or_path, "merge_and_unload"):
            raise ValueError("from_backbone needs a plain model, got a PEFT model: call merge_and_unload() first.")
        if not isinstance(model_or_path, PreTrainedModel):
            if kwargs.get("gguf_file") is not None:
                return cls._from_gguf(model_or_path, **kwargs)
            stored = cls._stored_config(model_or_path, kwargs)
            if stored.get("model_type") == AttnResConfig.model_type:
                raise ValueError(f"{model_or_path} is an AttnRes checkpoint; load it with from_pretrained.")
            return cls.from_pretrained(model_or_path, **kwargs)

        source = model_or_path
        if any(hasattr(parameter, "full_tensor") for parameter in source.parameters()):
            raise ValueError(
                "from_backbone needs a model that is not sharded, got one with sharded parameters: load its checkpoint "
                "with AttnResForCausalLM.from_pretrained and the same distributed_config."
            )
        packed = next((name for name, each in source.named_parameters() if not each.is_floating_point()), None)
        if packed is not None:
            raise ValueError(
                f"from_backbone copies floating-point weights, but {packed} is {source.get_parameter(packed).dtype}: "
                f"this {type(source).__name__} is quantised. Pass its checkpoint and the same quantization_config to "
                f"{cls.__name__}.from_backbone, or dequantize() the model first."
            )
        config = AttnResConfig.from_backbone(source.config, **kwargs)
        _warn_if_lossy(config)
        with init.no_init_weights():
            model = cls(config)
        if model.base_model is model:
            source = source.base_model
        prefix = f"{cls.base_model_prefix}." if source.base_model is source and model.base_model is not model else ""
        state = {prefix + name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        new = set(missing) - set(model.all_tied_weights_keys)
        new_head = {name for name in new if name.startswith(HEADS)}
        missing = {name for name in new - new_head if not _is_depth_name(name)}
        unexpected = [name for name in unexpected if not (new_head and name.startswith(HEADS))]
        if missing or unexpected:
            raise ValueError(
                f"the tensors of this {type(source).__name__} are not those of {cls.__name__}: "
                f"missing {_some(missing)}, unexpected {_some(unexpected)}."
            )
        if new_head:
            logger.warning(
                f"{type(source).__name__} has no {', '.join(sorted(new_head))}: newly initialized. "
                "You should probably train this model on a downstream task before you use it."
            )
        for module in {name.rpartition(".")[0] for name in new}:
            model._init_weights(model.get_submodule(module).to(source.device, source.dtype))
        model.tie_weights()
        model.to(source.device)
        if model.can_generate() and source.can_generate():
            model.generation_config = copy.deepcopy(source.generation_config)
        model.name_or_path = source.name_or_path
        return model.train(source.training)

    @classmethod
    def _from_gguf(cls, folder, output_loading_info: bool = False, **kwargs):
        """Loads the plain model from a GGUF file, which transformers reads by the family's names, and converts it."""
        if not issubclass(cls, GenerationMixin):
            raise ValueError(f"gguf_file={kwargs['gguf_file']} is a language model: load it with AttnResForCausalLM.")
        options = {name: kwargs.pop(name) for name in DEPTH_OPTIONS if name in kwargs}
        if isinstance(kwargs.get("config"), AttnResConfig):
            kwargs["config"] = kwargs["config"].backbone_config
        plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
        # The weights are unpacked now, and a model that is marked as quantised cannot be saved.
        plain.hf_quantizer, plain.is_quantized = None, False
        if hasattr(plain.config, "quantization_config"):
            del plain.config.quantization_config
        model = cls.from_backbone(plain, **options)
        return (model, info) if output_loading_info else model

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *mesh):
        """Distributes a model over devices by transformers' `DistributedConfig`, after checking the configuration."""
        if distributed_config is not None:
            _check_distribution(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *mesh)

    @staticmethod
    def _stored_config(model_or_path, kwargs: dict) -> dict:
        """Reads `config.json` without wrapping that of a plain model."""
        hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        return super(AttnResConfig, AttnResConfig).get_config_dict(model_or_path, **hub_arguments)[0]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, strict: bool | None = None, **kwargs):
        """Loads an AttnRes checkpoint, or a plain checkpoint as its lossless conversion.

        Depth options (`residual_mode`, `layers_per_block`, `num_blocks`, `depth_variant`, `scale_norm_eps`,
        `depth_implementation`) can be given as arguments. Pickled weights are not loaded by default.

        Args:
            pretrained_model_name_or_path, args, kwargs: as in `PreTrainedModel.from_pretrained`.
            strict: whether to raise an error if the tensors of the checkpoint are not those of the model (a new head is
                allowed), or if pseudo-queries were trained with other depth options than those given. With `False`
                missing tensors are random, as in transformers. The default is `True`, unless
                `output_loading_info=True` asks for the list of these tensors.

        Raises:
            ValueError: the checkpoint does not fit the model (see `strict`), or its weights are packed.
        """
        if kwargs.get("gguf_file") is not None:
            return cls._from_gguf(pretrained_model_name_or_path, *args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        strict = not with_info if strict is None else strict
        kwargs.setdefault("use_safetensors", True)  # a pickle can run code
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        overrides = any(kwargs.get(option) is not None for option in DEPTH_OPTIONS)
        reads_config = pretrained_model_name_or_path is not None and (overrides or kwargs.get("config") is None)
        stored = cls._stored_config(pretrained_model_name_or_path, kwargs) if reads_config else {}
        quantised = stored.get("quantization_config")
        if isinstance(quantised, dict) and quantised.get("format") == PACKED:
            raise ValueError(
                f"checkpoint {pretrained_model_name_or_path} has packed weights (quantization_config: {PACKED}), which "
                "cannot be loaded: attnres convert SRC DST unpacks them."
            )
        if is_deepspeed_zero3_enabled():
            # DeepSpeed breaks the decorators of classes that are defined while it partitions, so import them before.
            config = kwargs.get("config")
            if not isinstance(config, AttnResConfig):
                hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub_arguments)
            causal_lm_class(config.backbone_config)
        with _CONVERSIONS:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=ignore_mismatched_sizes or strict,  # _check_loading reports them in one line
                **kwargs,
            )
        if strict:
            _check_loading(model, pretrained_model_name_or_path, info, ignore_mismatched_sizes)
        if strict and overrides and stored.get("model_type") == AttnResConfig.model_type:
            _check_depth_options(model, pretrained_model_name_or_path, stored)
        return (model, info) if with_info else model


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _is_depth_name(name: str) -> bool:
    return "depth_mixer." in name


def _warn_if_lossy(config: AttnResConfig):
    if config.residual_mode != "standard" and VARIANTS[config.depth_variant].lossless is None:
        warnings.warn(
            f"depth_variant={config.depth_variant!r} does not start with the outputs of the plain model; train the "
            "converted model before you use it.",
            stacklevel=3,
        )


def _some(names, limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "none"


# Projections whose shards must consist of whole heads.
_HEADS = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj"), "num_attention_heads"),
    **dict.fromkeys(("k_proj", "v_proj"), "num_key_value_heads"),
}


def _check_distribution(model: AttnResPreTrainedModel, distributed_config):
    """Checks a `DistributedConfig`; transformers would only fail in the first forward pass, with an unclear error."""
    if (distributed_config.pp_size or 1) > 1:
        raise ValueError(
            f"pp_size={distributed_config.pp_size}: transformers' pipeline passes on one hidden state, but an AttnRes "
            "model needs all sources. Use attnres.parallel.Pipeline."
        )
    tp_size = distributed_config.tp_size or 1
    override = distributed_config.tp_plan if isinstance(distributed_config.tp_plan, dict) else {}
    for name, style in {**model.tp_plan, **override}.items():
        key = _HEADS.get(name.rpartition(".")[2])
        heads = getattr(model.config.backbone_config, key, None) if key else None
        if style == "colwise" and heads is not None and heads % tp_size:
            raise ValueError(
                f"tp_size={tp_size} would split an attention head: it must divide {key}={heads}, "
                f"as {name} is sharded by heads. Choose a tp_size that divides it."
            )


def _check_loading(model: AttnResPreTrainedModel, source: str | os.PathLike, info: dict, ignore_mismatched_sizes: bool):
    mismatched = [] if ignore_mismatched_sizes else info["mismatched_keys"]
    found = {
        # A new head is allowed; transformers has warned of it.
        "missing": [name for name in info["missing_keys"] if not name.startswith(HEADS)],
        "unexpected": info["unexpected_keys"],
        "misshapen": [f"{name} {list(stored)} instead of {list(expected)}" for name, stored, expected in mismatched],
    }
    problems = [f"{kind} {_some(names)}" for kind, names in found.items() if names]
    if problems:
        raise ValueError(
            f"checkpoint {source} does not have the tensors of this {type(model).__name__} "
            f"({model.config.backbone_config.model_type}, residual_mode={model.config.residual_mode}): "
            f"{'; '.join(problems)}. Fix the checkpoint or its config.json, or pass strict=False to load it anyway."
        )


def _check_depth_options(model: AttnResPreTrainedModel, source: str | os.PathLike, stored: dict):
    """Checks that depth options are those of the checkpoint, unless its pseudo-queries are zero.

    With zero pseudo-queries all depth options give the same function.
    """
    names = {"residual_mode": "block", "layers_per_block": None, "depth_variant": "attnres"}
    given = {name: getattr(model.config, name) for name in names}
    trained_for = {name: stored.get(name, default) for name, default in names.items()}
    if "block" != given["residual_mode"] == trained_for["residual_mode"]:
        given["layers_per_block"] = trained_for["layers_per_block"]  # only "block" mode reads it
    queries = (parameter for name, parameter in model.named_parameters() if name.endswith("_norm.query"))
    if given != trained_for and any(query.any() for query in queries):
        texts = [", ".join(f"{name}={value}" for name, value in each.items()) for each in (trained_for, given)]
        raise ValueError(
            f"checkpoint {source} has pseudo-queries trained for {texts[0]}, got {texts[1]}. "
            "Leave out the options, or pass strict=False to load it anyway."
        )


class AttnResModel(AttnResPreTrainedModel):
    """A backbone whose residual additions are replaced by mixtures over depth, without a head (paper, section 3).

    Its output has `depth_weights` beside the usual `last_hidden_state`, `past_key_values`, `hidden_states`,
    `attentions` and `router_logits`.

    Args:
        config: the configuration; the weights are initialised as those of the plain model with the same seed.
    """

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        backbone = config.backbone_config
        base = build_base_model(backbone)
        self.padding_idx = getattr(backbone, "pad_token_id", None)
        self.vocab_size = backbone.vocab_size
        self.embed_tokens = base.embed_tokens
        self.layers = nn.ModuleList(
            AttnResDecoderLayer(config, layer, layer_idx) for layer_idx, layer in enumerate(base.layers)
        )
        self.norm = base.norm
        self._norm_type = type(base.norm)
        self.rotary_emb = getattr(base, "rotary_emb", None)
        self.mixed_output = MixedInput()
        self.depth_weights = DepthWeights()
        self.depth_mixer = None
        if config.residual_mode != "standard":
            self.depth_mixer = DepthMixer(config.num_hidden_layers, config.hidden_size, config.depth_variant)
        # Set by attnres.parallel.shard_sequence: divides the tokens of a forward pass among devices.
        self.sequence_shards = None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_depth_weights: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResModelOutputWithPast:
        """Computes the final hidden states `[B, T, D]`.

        Args:
            input_ids: `[B, T]`; either these or `inputs_embeds` must be given.
            attention_mask: `[B, T]`, 1 for tokens and 0 for padding; or masks that `generate` has prepared.
            position_ids: `[B, T]`; positions that restart mark packed sequences.
            past_key_values: the cache to read and extend.
            inputs_embeds: `[B, T, D]`.
            use_cache: whether to return a cache; defaults to the backbone's configuration.
            output_depth_weights: whether to return `depth_weights`: 2 L + 1 tensors `[B, T, n]`, float32, with rows
                that sum to 1, in the order attention, MLP, attention, MLP, ..., output. The n sources are in the order
                of depth: the embedding first, the newest last.
            kwargs: `output_hidden_states` (the input of each decoder layer, then the final normed state: L + 1 tensors
                `[B, T, D]`), `output_attentions`, `output_router_logits`, and arguments of the attention functions.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, or depth weights are requested in
                "standard" mode.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if output_depth_weights and self.depth_mixer is None:
            raise ValueError(
                'output_depth_weights=True needs residual_mode "block" or "full": "standard" has no depth weights.'
            )
        backbone = self.config.backbone_config
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=backbone)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        layers = self.layers[: self.config.num_hidden_layers]
        indices = _indices(layers)
        kinds = types_of_layers(backbone, indices)
        layer_types = sorted(set(kinds.values()))
        masks = create_masks(
            backbone,
            layer_types,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        embedding_multiplier = get_family(backbone).embedding_multiplier
        if embedding_multiplier is not None:
            inputs_embeds = inputs_embeds * getattr(backbone, embedding_multiplier)
        rotary = rotary_inputs(backbone, layer_types, self.rotary_emb, inputs_embeds, position_ids)
        shards = None if self.sequence_shards is None else self.sequence_shards(inputs_embeds.shape[1])
        if shards is not None:
            inputs_embeds = shards.own(inputs_embeds)

        every_input = bool(kwargs.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False)))
        every_weight = bool(output_depth_weights)
        depth = Mixing.of(self.config).start(inputs_embeds)
        queries = None if self.depth_mixer is None else self.depth_mixer()

        def call_layer(index: int, layer: nn.Module, *state: torch.Tensor | None) -> torch.Tensor | tuple:
            return layer(
                None if queries is None else LayerQueries(queries[2 * index], queries[2 * index + 1]),
                *state,
                mixing=depth.mixing,
                attention_mask=masks[kinds[index]],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **rotary[kinds[index]],
                output_depth_weights=every_weight,
                output_hidden_states=every_input,
                sequence_shards=shards,
                **kwargs,
            )

        depth.walk(zip(indices, layers, strict=True), call_layer)
        hidden_states = self._read_output(depth, queries and queries[-1], shards, every_weight, every_input)
        return AttnResModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _read_output(self, depth: DepthState, query, shards, output_depth_weights: bool, output_hidden_states: bool):
        """Reads the output's mixture and norms it, `[B, T, D]`."""
        norm = None
        if shards is None and depth.fuses_norm() and not (output_hidden_states or is_hooked(self.mixed_output)):
            offset = get_family(self.config.backbone_config).norm_offset
            norm = norm_to_fuse(self.norm, self._norm_type, offset, depth.mixing.eps, depth.dtype)
        mixture, weights = depth.read(query, norm, output_depth_weights)
        if shards is not None:
            mixture = shards.gather(mixture)
        if output_depth_weights:
            self.depth_weights(weights if shards is None else shards.gather(weights))
        return mixture if norm is not None else self.norm(self.mixed_output(mixture))


def _indices(layers: Iterable[nn.Module]) -> list[int]:
    """Returns the original indices of decoder layers, which may be wrapped; some in between may have been removed."""

    def index(place: int, layer: nn.Module) -> int:
        if isinstance(layer, AttnResDecoderLayer):
            return layer.layer_idx
        own = (module.layer_idx for module in layer.modules() if isinstance(module, AttnResDecoderLayer))
        return next(own, place)

    return [index(place, layer) for place, layer in enumerate(layers)]


def _keep(hidden_states: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    if isinstance(positions, int):
        return hidden_states[:, slice(-positions, None)]
    if positions.ndim == 1:
        return hidden_states[:, positions]
    if positions.dtype == torch.bool:
        return hidden_states[positions]
    return torch.take_along_dim(hidden_states, positions.unsqueeze(-1), dim=1)


class AttnResForCausalLM(AttnResPreTrainedModel, GenerationMixin):
    """`AttnResModel` with a language-modelling head, for fine-tuning, generation and evaluation.

    Args:
        config: the configuration; the weights are initialised as those of the plain model with the same seed.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        family_class = causal_lm_class(config.backbone_config)
        self.model = AttnResModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_lm_head(config.backbone_config)
        self.post_init()
        for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"):
            setattr(self, plan, {**(getattr(family_class, plan, None) or {}), **(getattr(self, plan, None) or {})})

    @property
    def depth_mixer(self) -> DepthMixer | None:
        """The parameters of the mixing over depth; `None` in "standard" mode."""
        return self.model.depth_mixer

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResCausalLMOutputWithPast:
        """Computes the logits and, with labels, the loss. The other arguments are those of `AttnResModel.forward`.

        Args:
            labels: `[B, T]`, -100 for tokens without a loss; they are shifted here. `num_items_in_batch` in kwargs is
                the divisor of the loss.
            output_router_logits: whether to return the routers' logits and, if the family has one, to add the
                load-balancing loss; defaults to the backbone's configuration.
            logits_to_keep: the positions to compute logits for: the number K of last ones (0: all) or indices `[K]` or
                `[B, K]`, for logits `[B, K, V]`; or a boolean mask `[B, T]`, for logits `[number of True, V]`.
        """
        backbone = self.config.backbone_config
        if output_router_logits is None:
            output_router_logits = getattr(backbone, "output_router_logits", False)
        outputs: AttnResModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = scale_logits(backbone, self.lm_head(_keep(outputs.last_hidden_state, logits_to_keep)))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=backbone.vocab_size, **kwargs)
        aux_loss = None
        balancing_loss = load_balancing_loss(backbone) if output_router_logits else None
        if balancing_loss is not None:
            aux_loss = balancing_loss(outputs.router_logits, attention_mask)
            if loss is not None:
                loss = loss + backbone.router_aux_loss_coef * aux_loss.to(loss.device)
        return AttnResCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            depth_weights=outputs.depth_weights,
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        key = get_family(self.config.backbone_config).cache_reset_length
        limit = getattr(self.config.backbone_config, key, None) if key else None
        if past_key_values and limit and past_key_values.get_seq_length() <= limit < input_ids.shape[1]:
            # Beyond this length the rotary factors change, and all keys have to be computed again.
            past_key_values = None
            kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResPreTrainedModel):
    """`AttnResModel` with a linear layer `score` of `num_labels` on a text's last token: labels, scores or rewards."""

    def __init__(self, config: AttnResConfig):
        _start_head(self, config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class AttnResForTokenClassification(GenericForTokenClassification, AttnResPreTrainedModel):
    """`AttnResModel` with a linear layer `score` of `num_labels` on every token."""

    def __init__(self, config: AttnResConfig):
        _start_head(self, config)
        dropout = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in dropout if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)
        self.post_init()


class AttnResForQuestionAnswering(GenericForQuestionAnswering, AttnResPreTrainedModel):
    """`AttnResModel` with a linear layer `qa_outputs` on every token, for the start and end of an answer."""

    def __init__(self, config: AttnResConfig):
        _start_head(self, config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


def _start_head(model: AttnResPreTrainedModel, config: AttnResConfig):
    """Initialises a model with a head, in place of the constructors of transformers' heads.

    These create the base model with `AutoModel`, which would ask again to trust the code of a folder and load it as
    another module.
    """
    AttnResPreTrainedModel.__init__(model, config)
    model.num_labels = config.num_labels
    model.model = AttnResModel(config)


__all__ = [
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
]
