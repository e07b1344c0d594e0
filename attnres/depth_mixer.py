"""The mixing over depth: pseudo-queries, key norms, scores and weighted sums (paper, sections 3.1 and 3.2).

    h_l = sum_i a_{i->l} v_i,     a_{.->l} = softmax_i( w_l . RMSNorm_l(v_i) )

w_l is the pseudo-query of sublayer l, RMSNorm_l its key norm with a gain of its own, v_i the sources. Pseudo-queries
are parameters, so the logits of a source for all later sublayers are known the moment the source is complete: one
matrix product per source ("score on commit"). A sublayer then only has to softmax a few small logits and to mix.

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources, Q pseudo-queries scored at once.
"""

from functools import lru_cache

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
        """The pseudo-queries times the gains, `[*shape, D]`, float32 or wider: w . (g * x) = (w * g) . x."""
        precision = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.squeeze(-2).to(precision) * self.weight


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
        """Scaled pseudo-queries sqrt(D) w * g, `[2 L + 1, D]`, float32, in the order attention, MLP, ..., output."""
        sublayers = torch.stack([self.attention_norm(), self.mlp_norm()], dim=1).flatten(0, 1)
        queries = torch.cat([sublayers, self.output_norm().unsqueeze(0)])
        return queries * queries.shape[-1] ** 0.5


def score(source: torch.Tensor, queries: torch.Tensor, eps: float) -> torch.Tensor:
    """Logits of one source for several sublayers: w_q . RMSNorm_q(v) for every pseudo-query q.

    Computed as (sqrt(D) w_q * g_q) . v / hypot(|v|, sqrt(D eps)): the normed source never exists.

    Args:
        source: `[B, T, D]`, any floating dtype.
        queries: scaled pseudo-queries `[Q, D]`, as `DepthMixer` gives them.
        eps: epsilon of the key norms, the backbone's `rms_norm_eps`.

    Returns:
        `[B, T, Q]`, float32 (float64 for float64 sources).
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Score.apply(source, queries, eps)[0]
    product, norm = _product_and_norm(source, queries, eps)
    return product.to(norm.dtype) / norm  # under autocast the product is narrower


def _product_and_norm(source: torch.Tensor, queries: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    if source.dtype.itemsize < 4:
        source = source.float()
    floor = _constant((source.shape[-1] * eps) ** 0.5, source.dtype, source.device)
    norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True)
    return nn.functional.linear(source, queries.to(source.dtype)), torch.hypot(norm, floor)


def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    make = _new_constant if torch.compiler.is_compiling() else _kept_constant
    return make(value, dtype=dtype, device=device)


_new_constant = torch.tensor
_kept_constant = lru_cache(maxsize=64)(torch.tensor)


class _Score(torch.autograd.Function):
    """Saves the source itself, where autograd would save a float32 copy of one that is narrower."""

    @staticmethod
    def forward(source: torch.Tensor, queries: torch.Tensor, eps: float):
        product, norm = _product_and_norm(source, queries, eps)
        return product.to(norm.dtype) / norm, norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        source, queries, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(source, queries, *output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _):
        source, queries, logits, norm = ctx.saved_tensors
        by_product = gradient / norm
        by_source = by_queries = None
        if ctx.needs_input_grad[0]:
            by_norm = (gradient * logits).sum(-1, keepdim=True) / norm.square()
            by_source = torch.addcmul(by_product @ queries.to(gradient.dtype), by_norm, source, value=-1)
            by_source = by_source.to(source.dtype)
        if ctx.needs_input_grad[1]:
            flat = source.flatten(0, 1).to(gradient.dtype)
            by_queries = (by_product.flatten(0, 1).T @ flat).to(queries.dtype)
        return by_source, by_queries, None


class _WeightedSum(torch.autograd.Function):
    """sum_i weights_i * sources_i. Saves the sources themselves and the weights, nothing of the size of a source.

    Written down because autograd, given the sum step by step, would multiply whole sources only to reduce them.
    """

    @staticmethod
    def forward(weights: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return _weighted_sum(weights, *sources)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weights, *sources = ctx.saved_tensors
        columns = weights.to(gradient.dtype).split(1, dim=-1)
        by_source = [
            gradient * column if needed else None
            for column, needed in zip(columns, ctx.needs_input_grad[1:], strict=True)
        ]
        by_weight = torch.stack([_dot(gradient, source) for source in sources], dim=-1).to(weights.dtype)
        return by_weight, *by_source


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Over D, accumulated in float32: `[B, T, D]` twice to `[B, T]`."""
    if first.dtype in (torch.float32, torch.float64):
        return torch.einsum("btd,btd->bt", first, second)
    return (first * second).sum(-1, dtype=torch.float32)


def _weighted_sum(weights: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    columns = weights.to(sources[0].dtype).split(1, dim=-1)
    mixture = sources[0] * columns[0]
    for source, column in zip(sources[1:], columns[1:], strict=True):
        mixture.addcmul_(source, column)
    return mixture


def mix_bank(bank: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The same sources mixed for several sublayers at once; without autograd.

    Args:
        bank: n sources side by side, `[n, B, T, D]`.
        logits: of K sublayers, `[K, B, T, n]`, float32.

    Returns:
        `[K, B, T, D]` in the dtype of the bank. One pass over the sources per sublayer, summed in float32.
    """
    if len(bank) == 1:
        return bank.expand(len(logits), -1, -1, -1)
    weights = torch.softmax(logits, dim=-1).to(bank.dtype)
    rows, offsets = _bags(*logits.shape)
    mixtures = torch.embedding_bag(bank.flatten(0, 2), rows, offsets, mode=0, per_sample_weights=weights.view(-1))[0]
    return mixtures.view(*logits.shape[:3], bank.shape[-1])


def _bags(sublayers: int, batch: int, tokens: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a flat bank that belong to each sublayer and token, and where each one's rows begin."""
    make = _few_bags if sublayers * batch * tokens <= FEW_BAGS else _new_bags
    return make(sublayers, batch * tokens, count)


def _new_bags(sublayers: int, tokens: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(count) * tokens + torch.arange(tokens).unsqueeze(1)
    return rows.repeat(sublayers, 1).view(-1), torch.arange(0, sublayers * tokens * count, count)


FEW_BAGS = 1024  # while decoding, making them would take as long as summing them
_few_bags = lru_cache(maxsize=128)(_new_bags)


def mix_eager(
    sources: tuple[torch.Tensor, ...],
    logits: torch.Tensor,
    query: torch.Tensor | None,
    eps: float,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax over the sources, then their weighted sum, without stacking them.

    Args:
        sources: n tensors `[B, T, D]`.
        logits: `[B, T, n]`, float32; with a query `[B, T, n - 1]`, without the last source's.
        query: `[1, D]`, the scaled pseudo-query that the last source is to be scored with.
        eps: epsilon of its key norm.
        return_weights: whether the depth weights are wanted.

    Returns:
        The mixture `[B, T, D]` in the dtype of the sources and, if wanted, the depth weights `[B, T, n]`, float32.
    """
    by_hand = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if len(sources) == 2 and query is not None and not by_hand and not return_weights:
        return _merge(*sources, logits, query, eps), None
    if query is not None:
        logits = torch.cat([logits, score(sources[-1], query, eps)], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    weighted_sum = _WeightedSum.apply if by_hand else _weighted_sum
    return weighted_sum(weights, *sources), weights if return_weights else None


def _merge(first: torch.Tensor, last: torch.Tensor, logit: torch.Tensor, query: torch.Tensor, eps: float):
    """Of two sources, in few operations: a softmax over two is a sigmoid of their difference."""
    product, norm = _product_and_norm(last, query, eps)
    share_of_first = torch.sigmoid(torch.addcdiv(logit, product, norm, value=-1))
    return torch.lerp(last, first, share_of_first.to(last.dtype))


DEPTH_IMPLEMENTATIONS = {"eager": mix_eager}


def mix(
    sources: tuple[torch.Tensor, ...],
    logits: torch.Tensor,
    implementation: str,
    query: torch.Tensor | None = None,
    eps: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`mix_eager` or another implementation of it; a single source is passed through, its weight is 1."""
    if len(sources) == 1:
        return sources[0], torch.ones_like(logits) if return_weights else None
    return DEPTH_IMPLEMENTATIONS[implementation](sources, logits, query, eps, return_weights)
