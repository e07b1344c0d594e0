"""Attention Residuals as in the paper's pseudo-code: every sublayer stacks the sources, then norm, softmax and sum.

The mixing runs inside the transformers backbone itself: decoder layers keep their sublayers and get a new forward
method. It is the variant to beat, and the reference of every other variant. Shapes: B batch, T tokens, D hidden size,
n sources.
"""

from collections.abc import Callable

import torch
from torch import nn

from .. import AttnResConfig
from ..decoder_layer import AttnResDecoderLayer
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

    The pseudo-queries and gains of `depth` are copied. Without `layers_per_block` every sublayer output is a source.
    """
    config = AttnResConfig.from_backbone(model.config)
    eps, layers = model.config.rms_norm_eps, model.config.num_hidden_layers
    # One parameter per sublayer, as a model written this way has: the gradient of a row of a stacked parameter would
    # be as large as the whole stack.
    norms = (depth.attention_norm, depth.mlp_norm)
    queries = [norm.query[layer, 0] for layer in range(layers) for norm in norms]
    gains = [norm.weight[layer] for layer in range(layers) for norm in norms]
    model.depth_queries = nn.ParameterList(each.detach().clone() for each in [*queries, depth.output_norm.query[0]])
    model.depth_gains = nn.ParameterList(each.detach().clone() for each in [*gains, depth.output_norm.weight])
    sources = []  # of the current forward pass: the embedding, complete blocks, the partial sum of the current block

    def mixture(index: int) -> torch.Tensor:
        if len(sources) == 1:
            return sources[0]
        return mixing(tuple(sources), model.depth_queries[index], model.depth_gains[index], eps)

    def add(output: torch.Tensor, starts_block: bool):
        if starts_block:
            sources.append(output)
        else:
            sources[-1] = sources[-1] + output

    class Layer(AttnResDecoderLayer):
        def forward(self, hidden_states, *args, **inputs):
            index, modules, family = self.layer_idx, self._modules, self.family
            if index == 0:
                sources[:] = [hidden_states]
            starts_block = layers_per_block is None or index % layers_per_block == 0
            add(self._attention(modules[family.attention_pre_norm](mixture(2 * index)), inputs), starts_block)
            add(self._mlp(modules[family.mlp_pre_norm](mixture(2 * index + 1))), layers_per_block is None)
            return sources[-1]

    def mix_output(norm, args):
        mixed = mixture(2 * layers)
        sources.clear()  # otherwise the tensors of this pass would live until the next one
        return (mixed,)

    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Layer(config, layer, index).train(layer.training)
    model.model.norm.register_forward_pre_hook(mix_output)
