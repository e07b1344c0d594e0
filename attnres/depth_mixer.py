"""The mixing over depth: pseudo-queries, key norms, scores and weighted sums (paper, sections 3.1 and 3.2).

    h_l = sum_i a_{i->l} v_i,     a_{.->l} = softmax_i( w_l . RMSNorm_l(v_i) )

w_l is the pseudo-query of sublayer l, RMSNorm_l its key norm with a gain of its own, v_i the sources. Pseudo-queries
are parameters, so the logits of a source for all later sublayers are known the moment the source is complete: one
matrix product per source ("score on commit"). A sublayer then only has to softmax a few small logits and to mix.

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources, Q pseudo-queries scored at once.
"""

import torch
from torch import nn


class DepthScore(nn.Module):
    """Pseudo-queries with the gains of their key norms, for one place in the decoder layers.

    One module holds both, named `..._norm`, because Trainer exempts parameters from weight decay by that name: decay
    would pull a trained mixture back to a plain average.

    Args:
        shape: leading dimensions of the parameters, `(L,)` for one per decoder layer or `()` for the output.
        hidden_size: D.

    `query` is `[*shape, 1, D]` (the middle dimension is that of the on-disk projection), exactly zero at
    initialisation; `weight` is `[*shape, D]`, exactly one.
    """

    def __init__(self, shape: tuple[int, ...], hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(*shape, 1, hidden_size))
        self.weight = nn.Parameter(torch.ones(*shape, hidden_size))

    def forward(self) -> torch.Tensor:
        """The pseudo-queries times the gains, `[*shape, D]`: w . (g * x) = (w * g) . x."""
        return self.query.squeeze(-2) * self.weight


class DepthMixer(nn.Module):
    """All parameters of the mixing over depth, stacked over decoder layers.

    Args:
        num_layers: decoder layers L.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int):
        super().__init__()
        self.attention_norm = DepthScore((num_layers,), hidden_size)
        self.mlp_norm = DepthScore((num_layers,), hidden_size)
        self.output_norm = DepthScore((), hidden_size)

    def forward(self) -> torch.Tensor:
        """Gain-weighted pseudo-queries `[2 L + 1, D]` in the order attention, MLP, attention, MLP, ..., output."""
        sublayers = torch.stack([self.attention_norm(), self.mlp_norm()], dim=1).flatten(0, 1)
        return torch.cat([sublayers, self.output_norm().unsqueeze(0)])


def score(source: torch.Tensor, queries: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """Logits of one source for several sublayers: w_q . RMSNorm_q(v) for every pseudo-query q.

    Args:
        source: `[B, T, D]`, any floating dtype.
        queries: gain-weighted pseudo-queries `[Q, D]`.
        eps: epsilon of the key norms, the backbone's `rms_norm_eps`.

    Returns:
        Q tensors `[B, T]`, float32 (float64 for float64 sources).
    """
    # vector_norm keeps the source itself for the backward pass, where mean(square) would keep a float32 copy of it.
    precision = torch.promote_types(source.dtype, torch.float32)
    norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True, dtype=precision)
    inverse_rms = torch.rsqrt(norm.square() / source.shape[-1] + eps)
    if source.dtype == torch.float16:  # a sum over D of unnormed values leaves its range
        source = source.float()
    logits = nn.functional.linear(source, queries.to(source.dtype)).to(precision) * inverse_rms
    return logits.unbind(-1)


def mix_eager(sources: list[torch.Tensor], logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the sources, then their weighted sum, without stacking them.

    Args:
        sources: n tensors `[B, T, D]`.
        logits: n tensors `[B, T]`, float32.

    Returns:
        The mixture `[B, T, D]` in the dtype of the first source and the depth weights `[B, T, n]`, float32.
    """
    weights = torch.softmax(torch.stack(logits, dim=-1), dim=-1)
    columns = weights.to(sources[0].dtype).split(1, dim=-1)
    mixture = sources[0] * columns[0]
    for source, column in zip(sources[1:], columns[1:], strict=True):
        mixture = torch.addcmul(mixture, source, column)
    return mixture, weights


DEPTH_IMPLEMENTATIONS = {"eager": mix_eager}


def mix(
    sources: list[torch.Tensor], logits: list[torch.Tensor], implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mix_eager` or another implementation of it; a single source is passed through, its weight is 1."""
    if len(sources) == 1:
        return sources[0], torch.ones_like(logits[0]).unsqueeze(-1)
    return DEPTH_IMPLEMENTATIONS[implementation](sources, logits)
