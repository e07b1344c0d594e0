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
from .depth_functions import Norm, depth_weights
from .depth_mixer import mix, norms_too


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
        each_logits: where the depth weights are wanted, of the attention and of the MLP the logits of all complete
            sources one by one, `[B, T, n]`; those above may be of mixtures.
    """

    __slots__ = ("values",)

    def __init__(self, attention_query, attention_logits, mlp_query, mlp_logits, *each_logits):
        self.values = (attention_query, attention_logits, mlp_query, mlp_logits, *each_logits)

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


def _is_hooked(own: dict) -> bool:
    """By a module's own dictionary: this is asked for every token. transformers' recorders, which stay where outputs
    were asked for once, do not count."""
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
        self.family = get_family(backbone)
        self.layer_type = layer_type(backbone, layer_idx)
        self.rms_norm_eps = backbone.rms_norm_eps  # reading configurations is slow
        self.norm_offset = self.family.norm_offset
        self.pre_norms = (self.family.attention_pre_norm, self.family.mlp_pre_norm)
        multiplier = self.family.output_multiplier
        self.output_multiplier = 1.0 if multiplier is None else getattr(backbone, multiplier)
        self.residual_mode = config.residual_mode
        self._norm_type = type(getattr(self, self.pre_norms[0]))
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
        shared_sources: bool = True,
        depth_implementation: str = "eager",
        output_depth_weights: bool = False,
        output_hidden_states: bool = False,
        sequence_shards=None,
        **attention_inputs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """One decoder layer.

        All tensors of the depth computation come positionally and what is new is returned: nothing is changed in
        place, so that activation checkpointing may run a layer twice.

        Args:
            state: in `"standard"` mode the hidden states `[B, T, D]`. Otherwise for the attention, then for the MLP:
                the scaled pseudo-query `[1, D]` and the logits `[B, T, n]` of its n sources, as one `Scores`; then the
                sources, n tensors `[B, T, D]`, once if both read the same, else first the
                attention's; and, within a block, the partial sum `[B, T, D]`.
            shared_sources: whether both read the same.
            output_hidden_states: whether the attention's mixture is wanted before it is normed.
            sequence_shards: where T are this device's tokens only, what makes them whole before a sublayer (`gather`)
                and takes this device's from its output (`own`).
            attention_inputs: what the family's attention takes: `attention_mask`, `position_ids`, `past_key_values`,
                `use_cache`, `position_embeddings` where it has them, ...

        Returns:
            `"standard"`: the hidden states. `"block"`: the partial sum including this layer. `"full"`: the attention
            output and the MLP output, two new sources.
        """
        gather, own = _as_it_is, _as_it_is
        if sequence_shards is not None:
            gather, own = sequence_shards.gather, sequence_shards.own
        attention_norm, mlp_norm = self.pre_norms
        if self.residual_mode == "standard":
            (hidden_states,) = state
            normed = self._modules[attention_norm](self.mixed_input(gather(hidden_states)))
            hidden_states = hidden_states + own(self._attention(normed, attention_inputs))
            normed = self._modules[mlp_norm](gather(hidden_states))
            return hidden_states + own(self._mlp(normed))

        # Slices: older compilers take a starred name for a tuple.
        values, sources = state[0].values, list(state[1:])
        attention_query, attention_logits, mlp_query, mlp_logits = values[:4]
        each_logits = list(values[4:])
        partial = None if self.starts_block else sources.pop()
        count = len(sources) if shared_sources else len(sources) // 2
        attention_sources, mlp_sources = sources[:count], sources[-count:]
        dtype = sources[0].dtype  # under autocast sublayers return a narrower one; sums keep that of the embedding
        fusing = sequence_shards is None and norms_too(depth_implementation, sources[0])

        def normed(sources, logits, query, name: str, place: MixedInput | None = None):
            if output_depth_weights:
                self.depth_weights(gather(depth_weights(each_logits.pop(0), sources[-1], query, self.rms_norm_eps)))
            watched = place is not None and (output_hidden_states or _is_hooked(place.__dict__))
            norm = self._norm_to_fuse(name, dtype) if fusing and not watched else None
            mixed = mix(sources, logits, depth_implementation, query, self.rms_norm_eps, norm)
            if norm is not None:
                return mixed
            mixed = gather(mixed)
            return self._modules[name](mixed if place is None else place(mixed))

        query, place = attention_query, self._modules["mixed_input"]
        if partial is None:
            query = None
        else:
            attention_sources.append(partial)
        mixed = normed(tuple(attention_sources), attention_logits, query, attention_norm, place)
        newest = own(self._attention(mixed, attention_inputs))
        newest = newest if newest.dtype == dtype else newest.to(dtype)
        newest = newest if partial is None else partial + newest

        mlp_output = own(self._mlp(normed((*mlp_sources, newest), mlp_logits, mlp_query, mlp_norm)))
        mlp_output = mlp_output if mlp_output.dtype == dtype else mlp_output.to(dtype)
        return newest + mlp_output if self.residual_mode == "block" else (newest, mlp_output)

    def _norm_to_fuse(self, name: str, dtype: torch.dtype) -> Norm | None:
        """A sublayer's norm as numbers, for the mixing to apply it too; `None` where the module itself has to be
        called: something has replaced it, hooks on to it, or gives it another dtype than its input's."""
        norm = self._modules[name]
        own = norm.__dict__
        weight = own["_parameters"].get("weight")  # of none that FSDP or a parametrisation has put elsewhere
        if (
            type(norm) is self._norm_type
            and type(weight) is nn.Parameter
            and weight.dtype == dtype != torch.float64  # which the families norm in float32
            and "forward" not in own
            and not _is_hooked(own)
        ):
            return Norm(weight, self.norm_offset, self.rms_norm_eps)
        return None

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
