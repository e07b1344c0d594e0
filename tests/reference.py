"""The oracle: Attention Residuals written down naively, on top of the family's own unchanged forward pass.

Knows nothing of the package. The plain transformers model runs as it is; hooks replace what its norms read by a
mixture that is stacked, normed and summed from scratch at every sublayer, and record what its sublayers return. Its
residual stream is computed and ignored.
"""

import torch

# Modules of a decoder layer: norm read by the attention, last module of its output, and the same for the MLP.
SUBLAYERS = {
    "default": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    "phi3": ("input_layernorm", "resid_attn_dropout", "post_attention_layernorm", "resid_mlp_dropout"),
    "granitemoe": ("input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe"),
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "gemma3_text": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def mixture(sources, query, gain, eps):
    """Stack, norm, softmax, mix: `sources` n tensors [B, T, D]; returns [B, T, D] and weights [B, T, n]."""
    values = torch.stack(sources)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * gain
    weights = torch.softmax(torch.einsum("d,nbtd->nbt", query, keys), dim=0)
    return (weights.unsqueeze(-1) * values).sum(0), weights.permute(1, 2, 0)


def sources_of(sublayer, outputs, sublayers_per_block):
    """Sources of a sublayer (from 0): `outputs` are the embedding and the outputs of all earlier sublayers.

    sublayers_per_block is the paper's S; None is Full AttnRes.
    """
    embedding, outputs = outputs[0], outputs[1 : sublayer + 1]
    if sublayers_per_block is None:
        return [embedding, *outputs]
    blocks = [outputs[start : start + sublayers_per_block] for start in range(0, len(outputs), sublayers_per_block)]
    return [embedding, *(torch.stack(block).sum(0) for block in blocks)]


class Oracle:
    """A plain transformers causal LM computing Attention Residuals by hooks.

    Args:
        model: the plain model.
        queries, gains: [2 * layers + 1, D] each, in the order attention, MLP, ..., output.
        sublayers_per_block: the paper's S, or None for Full.
        scale_norm_eps: whether the norm after a mixture of n sources has epsilon / n^2, which is to norm n times it.
    """

    def __init__(self, model, queries, gains, sublayers_per_block, scale_norm_eps=False):
        self.scale_norm_eps = scale_norm_eps
        self.queries, self.gains, self.sublayers_per_block = queries, gains, sublayers_per_block
        self.model = model
        self.eps = model.config.rms_norm_eps
        self.factor = getattr(model.config, "residual_multiplier", 1.0)
        self.outputs, self.weights = [], []
        names = SUBLAYERS.get(model.config.model_type, SUBLAYERS["default"])
        layers = model.model.layers
        self.handles = [layers[0].register_forward_pre_hook(self._start, with_kwargs=True)]
        for index, layer in enumerate(layers):
            attention_norm, attention, mlp_norm, mlp = names
            attention = "linear_attn" if hasattr(layer, "linear_attn") else attention
            for sublayer, (norm, output) in enumerate(((attention_norm, attention), (mlp_norm, mlp)), 2 * index):
                self.handles.append(getattr(layer, norm).register_forward_pre_hook(self._mix(sublayer)))
                self.handles.append(getattr(layer, output).register_forward_hook(self._record))
        self.handles.append(model.model.norm.register_forward_pre_hook(self._mix(2 * len(layers))))

    def _start(self, module, args, kwargs):
        self.outputs, self.weights = [args[0] if args else kwargs["hidden_states"]], []

    def _mix(self, sublayer):
        def hook(module, args):
            sources = sources_of(sublayer, self.outputs, self.sublayers_per_block)
            mixed, weights = mixture(sources, self.queries[sublayer], self.gains[sublayer], self.eps)
            self.weights.append(weights)
            return (mixed * len(sources) if self.scale_norm_eps else mixed, *args[1:])

        return hook

    def _record(self, module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        self.outputs.append(output * self.factor)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)
