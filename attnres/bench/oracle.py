"""Attention Residuals as in the paper's pseudo-code: every sublayer stacks the sources, then norm, softmax and sum.

The mixing runs inside the transformers backbone itself: decoder layers keep their sublayers and get a new forward
method. It is the variant to beat, and the reference of every other variant. Shapes: B batch, T tokens, D hidden size,
n sources.
"""

from collections.abc import Callable
from types import MethodType

import torch
from torch import nn

from ..backbones import get_family, layer_type
from ..depth_mixer import DepthMixer

Sources = tuple[torch.Tensor, ...]
# Maps (sources, query [D], gain [D], eps) to the mixture [B, T, D].
Mixing = Callable[[Sources, torch.Tensor, torch.Tensor, float], torch.Tensor]


def stack_and_mix(sources: Sources, query: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Mixes n sources `[B, T, D]` by the pseudo-code of the paper's README."""
    values = torch.stack(sources)
    keys = nn.functional.rms_norm(values, (values.shape[-1],), gain, eps)
    logits = torch.einsum("d, n b t d -> n b t", query, keys)
    return torch.einsum("n b t, n b t d -> b t d", logits.softmax(0), values)


def mix_over_depth(model, depth: DepthMixer, layers_per_block: int | None, mixing: Mixing):
    """Replaces the residual additions of a plain transformers model by Attention Residuals, in place.

    Args:
        model: model of a supported family.
        depth: mixer whose pseudo-queries and gains are copied.
        layers_per_block: decoder layers per block; None: every sublayer output is a source (Full AttnRes).
        mixing: function that mixes the sources of one sublayer.
    """
    config = model.config
    # One parameter per sublayer, as a model written this way has: the gradient of a row of a stacked parameter would
    # be as large as the whole stack.
    norms = (depth.attention_norm, depth.mlp_norm)
    queries = [norm.query[layer, 0] for layer in range(config.num_hidden_layers) for norm in norms]
    gains = [norm.weight[layer] for layer in range(config.num_hidden_layers) for norm in norms]
    model.depth_queries = nn.ParameterList(each.detach().clone() for each in [*queries, depth.output_norm.query[0]])
    model.depth_gains = nn.ParameterList(each.detach().clone() for each in [*gains, depth.output_norm.weight])
    sources = []  # of the current forward pass: the embedding, complete blocks, the partial sum of the current block

    def mixture(index: int) -> torch.Tensor:
        if len(sources) == 1:
            return sources[0]
        return mixing(tuple(sources), model.depth_queries[index], model.depth_gains[index], config.rms_norm_eps)

    def add(output: torch.Tensor, starts_block: bool):
        if starts_block:
            sources.append(output)
        else:
            sources[-1] = sources[-1] + output

    def forward_of(layer_idx: int):
        def forward(layer, hidden_states, *args, **inputs):
            if layer_idx == 0:
                sources[:] = [hidden_states]
            starts_block = layers_per_block is None or layer_idx % layers_per_block == 0
            add(_attention(config, layer, layer_idx, mixture(2 * layer_idx), inputs), starts_block)
            add(_mlp(config, layer, mixture(2 * layer_idx + 1)), layers_per_block is None)
            return sources[-1]

        return forward

    def mix_output(norm, args):
        mixed = mixture(2 * config.num_hidden_layers)
        sources.clear()  # otherwise the tensors of this pass would live until the next one
        return (mixed,)

    for layer_idx, layer in enumerate(model.model.layers):
        layer.forward = MethodType(forward_of(layer_idx), layer)
    model.model.norm.register_forward_pre_hook(mix_output)


def _attention(config, layer: nn.Module, layer_idx: int, hidden_states: torch.Tensor, inputs: dict) -> torch.Tensor:
    family = get_family(config)
    hidden_states = getattr(layer, family.attention_pre_norm)(hidden_states)
    if layer_type(config, layer_idx) == "linear_attention":
        inputs = {**inputs, "cache_params": inputs.get("past_key_values")}
        for name in ("past_key_values", "use_cache", "position_ids", "position_embeddings"):
            inputs.pop(name, None)
        output = getattr(layer, family.linear_attention)(hidden_states=hidden_states, **inputs)
    else:
        output, _ = getattr(layer, family.attention)(hidden_states=hidden_states, **inputs)
    return _finished(config, layer, output, family.attention_post_norm, family.attention_dropout)


def _mlp(config, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    family = get_family(config)
    output = getattr(layer, family.mlp)(getattr(layer, family.mlp_pre_norm)(hidden_states))
    output = output[0] if isinstance(output, tuple) else output
    return _finished(config, layer, output, family.mlp_post_norm, family.mlp_dropout)


def _finished(config, layer: nn.Module, output: torch.Tensor, *names: str | None) -> torch.Tensor:
    """Applies the family's norm, dropout and multiplier of sublayer outputs."""
    for name in names:
        output = output if name is None else getattr(layer, name)(output)
    multiplier = get_family(config).output_multiplier
    return output if multiplier is None else output * getattr(config, multiplier)
