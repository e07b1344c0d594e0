"""A family's decoder layer with mixtures over depth in place of its residual additions.

Shapes: B batch, T tokens, D hidden size, n sources.
"""

import functools

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .backbones import get_family, layer_type
from .configuration_attnres import AttnResConfig
from .depth_mixer import DepthState, Mixing, Norm, PseudoQuery
from .torch_internals import is_fake


class MixedInput(nn.Identity):
    """The input a decoder layer mixed from its sources; a place for `output_hidden_states` to look."""


class DepthWeights(nn.Identity):
    """The weights of one mixture; a place for `output_depth_weights` to look."""


class SublayerWeights(nn.Identity):
    """The attention weights of a softmax attention; a place for `output_attentions` to look."""


class LayerQueries:
    """What the two sublayers of a decoder layer read with, in one object that is no container.

    FSDP casts all tensors that it finds in the arguments of a wrapped module to its parameters' dtype. Pseudo-queries
    have to stay float32: rounded to bfloat16 a logit of 50 is off by 0.1, and so is its source's weight.
    """

    __slots__ = ("attention", "mlp")

    def __init__(self, attention: PseudoQuery, mlp: PseudoQuery):
        self.attention, self.mlp = attention, mlp

    def to(self, device: torch.device, non_blocking: bool = False) -> "LayerQueries":
        """On another device; accelerate's hooks call this where layers are spread over several."""
        return LayerQueries(self.attention.to(device), self.mlp.to(device))


def _checkpoint_unpacked(checkpoint, function, queries: LayerQueries | None, *state):
    """`checkpoint(function, queries, *state)` with pseudo-queries one by one: activation checkpointing has to find
    every tensor that is to get a gradient among the arguments."""
    if not isinstance(queries, LayerQueries):  # a residual stream, or unpacked by what wraps this
        return checkpoint(function, queries, *state)

    def packed(attention, attention_extra, mlp, mlp_extra, *state):
        queries = LayerQueries(PseudoQuery(attention, attention_extra), PseudoQuery(mlp, mlp_extra))
        return function(queries, *state)

    return checkpoint(packed, *queries.attention, *queries.mlp, *state)


def norm_to_fuse(norm: nn.Module, norm_type: type, offset: float, eps: float, dtype: torch.dtype) -> Norm | None:
    """A family's norm as numbers, for the mixing to apply it too; `None` where the module itself has to be called:
    something has replaced it, hooks on to it, or gives it another dtype than its input's."""
    own = norm.__dict__
    weight = own["_parameters"].get("weight")  # of none that FSDP or a parametrisation has put elsewhere
    if (
        type(norm) is norm_type
        and (type(weight) is nn.Parameter or is_fake(weight))
        and weight.dtype == dtype
        and "forward" not in own
        and not is_hooked(norm)
    ):
        return Norm(weight, offset, eps)
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether something looks at what goes into or comes out of a module. transformers' recorders, which stay where
    outputs were asked for once, do not count."""
    own = module.__dict__  # this is asked for every token
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    hooks = own["_forward_hooks"]
    return bool(hooks) and any(getattr(hook, "__module__", "") != OutputRecorder.__module__ for hook in hooks.values())


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A family's decoder layer whose two residual additions are mixtures over depth.

    Takes over the sublayers and norms of `layer` under their own names.

    Args:
        config: configuration of the AttnRes model.
        layer: the family's decoder layer.
        layer_idx: its index, from 0.
    """

    def __init__(self, config: AttnResConfig, layer: nn.Module, layer_idx: int):
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        backbone = config.backbone_config
        self.config = config
        self.layer_idx = layer_idx
        self.residual_mode = config.residual_mode
        self.family = get_family(backbone)
        self.layer_type = layer_type(backbone, layer_idx)
        self.rms_norm_eps = backbone.rms_norm_eps  # reading configurations is slow
        multiplier = self.family.output_multiplier
        self.output_multiplier = 1.0 if multiplier is None else getattr(backbone, multiplier)
        self._norm_type = type(getattr(self, self.family.attention_pre_norm))
        self.mixed_input = MixedInput()
        self.sublayer_weights = SublayerWeights()
        self.depth_weights = DepthWeights()

    @property
    def _gradient_checkpointing_func(self):  # transformers sets it on every layer
        return functools.partial(_checkpoint_unpacked, self._checkpoint)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint):
        self._checkpoint = checkpoint

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self):
        del self._checkpoint

    def forward(
        self,
        queries: LayerQueries | None,
        partial: torch.Tensor | None,
        *sources: torch.Tensor,
        mixing: Mixing,
        output_depth_weights: bool = False,
        output_hidden_states: bool = False,
        sequence_shards=None,
        **attention_inputs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """One decoder layer: reads a mixture and adds what its attention makes of it, then the same with its MLP.

        Nothing is changed in place, so that activation checkpointing may run a layer twice.

        Args:
            queries: what the attention and the MLP read with; `None` in `"standard"` mode.
            partial: the partial sum of the block `[B, T, D]`, `None` at its start; in `"standard"` mode the residual
                stream.
            sources: complete sources, n tensors `[B, T, D]`.
            mixing: how the model mixes.
            output_hidden_states: whether the attention's mixture is wanted before it is normed.
            sequence_shards: where T are this device's tokens only, what makes them whole before a sublayer (`gather`)
                and takes this device's from its output (`own`).
            attention_inputs: what the family's attention takes: `attention_mask`, `position_ids`, `past_key_values`,
                `use_cache`, `position_embeddings` where it has them, ...

        Returns:
            The partial sum including this layer; in `"full"` mode the attention output and the MLP output, two new
            sources.
        """
        depth = DepthState(mixing, sources, partial)
        fuse = sequence_shards is None and depth.fuses_norm()
        attention, mlp = (None, None) if queries is None else (queries.attention, queries.mlp)

        def read(query: PseudoQuery | None, name: str, place: MixedInput | None = None) -> torch.Tensor:
            norm, fused = self._modules[name], None
            if fuse and not (place is not None and (output_hidden_states or is_hooked(place))):
                fused = norm_to_fuse(norm, self._norm_type, self.family.norm_offset, self.rms_norm_eps, depth.dtype)
            mixture, weights = depth.read(query, fused, output_depth_weights)
            if sequence_shards is not None:
                mixture = sequence_shards.gather(mixture)
                weights = sequence_shards.gather(weights) if output_depth_weights else None
            if output_depth_weights:
                self.depth_weights(weights)
            if fused is not None:
                return mixture
            return norm(mixture if place is None else place(mixture))

        own = sequence_shards.own if sequence_shards is not None else lambda output: output
        normed = read(attention, self.family.attention_pre_norm, self.mixed_input)
        depth.add(own(self._attention(normed, attention_inputs)))
        normed = read(mlp, self.family.mlp_pre_norm)
        depth.add(own(self._mlp(normed)))
        return depth.new

    def _attention(self, hidden_states: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Attention and what belongs to its output: normed `[B, T, D]` to `[B, T, D]`, one source."""
        if self.layer_type == "linear_attention":
            inputs = {**inputs, "cache_params": inputs["past_key_values"]}
            for name in ("past_key_values", "use_cache", "position_ids", "position_embeddings"):
                inputs.pop(name, None)
            output = self._modules[self.family.linear_attention](hidden_states=hidden_states, **inputs)
        else:
            output, weights = self._modules[self.family.attention](hidden_states=hidden_states, **inputs)
            if weights is not None:
                self.sublayer_weights(weights)
        return self._finish(output, self.family.attention_post_norm, self.family.attention_dropout)

    def _mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """MLP or mixture of experts and what belongs to its output: normed `[B, T, D]` to `[B, T, D]`, one source."""
        output = self._modules[self.family.mlp](hidden_states)
        output = output[0] if isinstance(output, tuple) else output  # some experts return their router's logits too
        return self._finish(output, self.family.mlp_post_norm, self.family.mlp_dropout)

    def _finish(self, output: torch.Tensor, post_norm: str | None, dropout: str | None) -> torch.Tensor:
        if post_norm is not None:
            output = self._modules[post_norm](output)
        if dropout is not None:
            output = self._modules[dropout](output)
        return output if self.output_multiplier == 1.0 else output * self.output_multiplier
