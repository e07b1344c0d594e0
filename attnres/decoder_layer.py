"""A family's decoder layer with mixtures over depth in place of its residual additions.

Shapes: B batch, T tokens, D hidden size, n sources.
"""

import functools

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .backbones import get_family, layer_type
from .configuration_attnres import AttnResConfig
from .depth_mixer import mix


class MixedInput(nn.Identity):
    """The input a decoder layer mixed from its sources; a place for `output_hidden_states` to look."""


class DepthWeights(nn.Identity):
    """The weights of one mixture; a place for `output_depth_weights` to look."""


class SublayerWeights(nn.Identity):
    """The attention weights of a softmax attention; a place for `output_attentions` to look."""


class Scores:
    """The pseudo-queries and logits that a decoder layer is called with, in one object that is no container.

    FSDP casts all tensors that it finds in the arguments of a wrapped module to its parameters' dtype. Logits have to
    stay float32: rounded to bfloat16 one of 50 is off by 0.1, and so is its source's weight.

    Args:
        attention_query, attention_logits, mlp_query, mlp_logits: as in `AttnResDecoderLayer.forward`.
    """

    __slots__ = ("values",)

    def __init__(self, attention_query, attention_logits, mlp_query, mlp_logits):
        self.values = (attention_query, attention_logits, mlp_query, mlp_logits)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Scores":
        """On another device; accelerate's hooks call this where layers are spread over several."""
        return Scores(
            *(
                value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
                for value in self.values
            )
        )


def _checkpoint_scores(checkpoint, function, *state):
    """`checkpoint(function, *state)`, unpacking scores for it: it has to see every tensor to give it a gradient."""
    if not isinstance(state[0], Scores):
        return checkpoint(function, *state)
    scores, *others = state
    count = len(scores.values)

    def packed(*tensors):
        return function(Scores(*tensors[:count]), *tensors[count:])

    return checkpoint(packed, *scores.values, *others)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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
        self.family = get_family(backbone)
        self.layer_type = layer_type(backbone, layer_idx)
        self.rms_norm_eps = backbone.rms_norm_eps  # reading configurations is slow
        multiplier = self.family.output_multiplier
        self.output_multiplier = 1.0 if multiplier is None else getattr(backbone, multiplier)
        self.residual_mode = config.residual_mode
        self.starts_block = config.residual_mode == "full" or layer_idx % config.layers_per_block == 0
        self.mixed_input = MixedInput()
        self.sublayer_weights = SublayerWeights()
        self.depth_weights = DepthWeights()

    @property
    def _gradient_checkpointing_func(self):
        return functools.partial(_checkpoint_scores, self._checkpoint)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint):  # transformers sets it on every layer
        self._checkpoint = checkpoint

    def forward(
        self,
        *state: torch.Tensor | Scores,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings=None,
        shared_sources: bool = True,
        depth_implementation: str = "eager",
        output_depth_weights: bool = False,
        sequence_shards=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """One decoder layer.

        All tensors of the depth computation come positionally and what is new is returned: nothing is changed in
        place, so that activation checkpointing may run a layer twice.

        Args:
            state: in `"standard"` mode the hidden states `[B, T, D]`. Otherwise for the attention, then for the MLP:
                the scaled pseudo-query `[1, D]` and the logits `[B, T, n]` of its n sources, these four also as one
                `Scores`; then the sources, n tensors `[B, T, D]`, once if both read the same, else first the
                attention's; and, within a block, the partial sum `[B, T, D]`.
            shared_sources: whether both read the same.
            sequence_shards: where T are this device's tokens only, what makes them whole before a sublayer (`gather`)
                and takes this device's from its output (`own`).

        Returns:
            `"standard"`: the hidden states. `"block"`: the partial sum including this layer. `"full"`: the attention
            output and the MLP output, two new sources.
        """
        attention_inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **({} if position_embeddings is None else {"position_embeddings": position_embeddings}),
            **kwargs,
        }
        gather, own = (_as_it_is,) * 2 if sequence_shards is None else (sequence_shards.gather, sequence_shards.own)
        if self.residual_mode == "standard":
            (hidden_states,) = state
            hidden_states = hidden_states + own(
                self._attention(self.mixed_input(gather(hidden_states)), attention_inputs)
            )
            return hidden_states + own(self._mlp(gather(hidden_states)))

        if isinstance(state[0], Scores):
            state = (*state[0].values, *state[1:])
        # Slices: older compilers take a starred name for a tuple.
        attention_query, attention_logits, mlp_query, mlp_logits = state[:4]
        sources, partial = (state[4:], None) if self.starts_block else (state[4:-1], state[-1])
        count = len(sources) if shared_sources else len(sources) // 2
        attention_sources, mlp_sources = sources[:count], sources[-count:]
        dtype = sources[0].dtype  # under autocast sublayers return a narrower one; sums keep that of the embedding

        def mixture(sources, logits, query):
            mixed, weights = mix(sources, logits, depth_implementation, query, self.rms_norm_eps, output_depth_weights)
            if output_depth_weights:
                self.depth_weights(gather(weights))
            return mixed

        if partial is None:
            mixed = mixture(attention_sources, attention_logits, None)
        else:
            mixed = mixture((*attention_sources, partial), attention_logits, attention_query)
        newest = own(self._attention(self.mixed_input(gather(mixed)), attention_inputs))
        newest = newest if newest.dtype == dtype else newest.to(dtype)
        newest = newest if partial is None else partial + newest

        mlp_output = own(self._mlp(gather(mixture((*mlp_sources, newest), mlp_logits, mlp_query))))
        mlp_output = mlp_output if mlp_output.dtype == dtype else mlp_output.to(dtype)
        return newest + mlp_output if self.residual_mode == "block" else (newest, mlp_output)

    def _attention(self, hidden_states: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Norm, attention and what belongs to its output: `[B, T, D]` to `[B, T, D]`, one source."""
        hidden_states = getattr(self, self.family.attention_pre_norm)(hidden_states)
        if self.layer_type == "linear_attention":
            inputs = {**inputs, "cache_params": inputs["past_key_values"]}
            for name in ("past_key_values", "use_cache", "position_ids", "position_embeddings"):
                inputs.pop(name, None)
            output = getattr(self, self.family.linear_attention)(hidden_states=hidden_states, **inputs)
        else:
            output, weights = getattr(self, self.family.attention)(hidden_states=hidden_states, **inputs)
            if weights is not None:
                self.sublayer_weights(weights)
        return self._finish(output, self.family.attention_post_norm, self.family.attention_dropout)

    def _mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm, MLP or mixture of experts and what belongs to its output: `[B, T, D]` to `[B, T, D]`, one source."""
        output = getattr(self, self.family.mlp)(getattr(self, self.family.mlp_pre_norm)(hidden_states))
        output = output[0] if isinstance(output, tuple) else output  # some experts return their router's logits too
        return self._finish(output, self.family.mlp_post_norm, self.family.mlp_dropout)

    def _finish(self, output: torch.Tensor, post_norm: str | None, dropout: str | None) -> torch.Tensor:
        if post_norm is not None:
            output = getattr(self, post_norm)(output)
        if dropout is not None:
            output = getattr(self, dropout)(output)
        return output if self.output_multiplier == 1.0 else output * self.output_multiplier
