"""A family's decoder layer with mixtures over depth in place of its residual additions (paper, section 3).

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
    """Passes on the mixture that a decoder layer reads first, so that `output_hidden_states` can record it."""


class DepthWeights(nn.Identity):
    """Receives the weights of one mixture, so that `output_depth_weights` can record them."""


class SublayerWeights(nn.Identity):
    """Receives the attention weights of a softmax attention, so that `output_attentions` can record them."""


class LayerQueries:
    """The pseudo-queries of the two sublayers of a decoder layer, in one object that is not a container.

    FSDP casts all tensors that it finds in the arguments of a wrapped module to the dtype of its parameters, but
    pseudo-queries have to stay float32: rounded to bfloat16, a logit of 50 is off by 0.1.
    """

    __slots__ = ("attention", "mlp")

    def __init__(self, attention: PseudoQuery, mlp: PseudoQuery):
        self.attention, self.mlp = attention, mlp

    def to(self, device: torch.device, non_blocking: bool = False) -> "LayerQueries":
        """Copies the queries to another device, for accelerate's hooks where layers are spread over several devices."""
        return LayerQueries(self.attention.to(device), self.mlp.to(device))


def _checkpoint_unpacked(checkpoint, function, queries: LayerQueries | None, *state):
    """Calls `checkpoint(function, queries, *state)` with the tensors of the queries as arguments of their own.

    Activation checkpointing only computes gradients for tensors that it finds among the arguments.
    """
    if not isinstance(queries, LayerQueries):  # "standard" mode, or a wrapper has unpacked them already
        return checkpoint(function, queries, *state)

    def packed(attention, attention_extra, mlp, mlp_extra, *state):
        queries = LayerQueries(PseudoQuery(attention, attention_extra), PseudoQuery(mlp, mlp_extra))
        return function(queries, *state)

    return checkpoint(packed, *queries.attention, *queries.mlp, *state)


def norm_to_fuse(norm: nn.Module, norm_type: type, offset: float, eps: float, dtype: torch.dtype) -> Norm | None:
    """Returns a family's norm as numbers that the fused operator can apply, or `None` if the module must be called.

    The module must be called if it was replaced, has hooks, or has a weight of another dtype than its input.
    """
    own = norm.__dict__
    weight = own["_parameters"].get("weight")  # missing if FSDP or a parametrization has moved it
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
    """Returns whether hooks observe a module's inputs or outputs.

    transformers' recorders do not count: they stay on a module after outputs have been requested once.
    """
    own = module.__dict__  # attribute access is slow, and this runs for every token
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    hooks = own["_forward_hooks"]
    return bool(hooks) and any(getattr(hook, "__module__", "") != OutputRecorder.__module__ for hook in hooks.values())


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A family's decoder layer whose two residual additions are replaced by mixtures over depth.

    It takes over the sublayers and norms of `layer` under their own names.

    Args:
        config: configuration of the AttnRes model.
        layer: the family's decoder layer.
        layer_idx: the layer's index, from 0.
    """

    def __init__(self, config: AttnResConfig, layer: nn.Module, layer_idx: int):
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        backbone = config.backbone_config
        self.config = config
        self.layer_idx = layer_idx
        self.family = get_family(backbone)
        self.layer_type = layer_type(backbone, layer_idx)
        self.rms_norm_eps = backbone.rms_norm_eps  # reading a configuration in every forward pass is slow
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
        """Runs both sublayers: each reads a mixture of the sources, norms it, and adds its output to the partial sum.

        Nothing is changed in place, so that activation checkpointing can run a layer twice.

        Args:
            queries: the pseudo-queries of the attention and the MLP; `None` in "standard" mode.
            partial: the partial sum of the block `[B, T, D]`, `None` at its start; in "standard" mode the residual
                stream.
            sources: the complete sources, n tensors `[B, T, D]`.
            mixing: the depth options.
            output_depth_weights: whether to record the depth weights.
            output_hidden_states: whether to record the attention's mixture before it is normed.
            sequence_shards: if the T tokens are one device's share of a sequence, an object that collects all tokens
                before a sublayer (`gather`) and returns this device's share of its output (`own`).
            attention_inputs: arguments of the family's attention: `attention_mask`, `position_ids`, `past_key_values`,
                `use_cache`, `position_embeddings`, ...

        Returns:
            The partial sum including this layer or, in "full" mode, the attention output and the MLP output, which are
            two new sources.
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
        """Computes the attention's output, post-norm and dropout included: normed `[B, T, D]` to `[B, T, D]`."""
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
        """Computes the output of the MLP or the experts, as `_attention` does for the attention."""
        output = self._modules[self.family.mlp](hidden_states)
        output = output[0] if isinstance(output, tuple) else output  # some experts return the router's logits as well
        return self._finish(output, self.family.mlp_post_norm, self.family.mlp_dropout)

    def _finish(self, output: torch.Tensor, post_norm: str | None, dropout: str | None) -> torch.Tensor:
        if post_norm is not None:
            output = self._modules[post_norm](output)
        if dropout is not None:
            output = self._modules[dropout](output)
        return output if self.output_multiplier == 1.0 else output * self.output_multiplier
