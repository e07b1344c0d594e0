"""What is computed from the sources, with gradients: scores, mixtures, and mixtures with the RMSNorm that follows.

    h = sum_i a_i v_i,     a = softmax_i(logits),     y = g * h / sqrt(mean(h^2) + norm_eps)

The gradient of a logit is a_i (dh . v_i - dh . h), and those of all logits add up to zero, so that the first one's is
minus the sum of the others: with a norm the backward pass needs h, but not the first source, which is usually the
mixture of all complete ones and needed by nothing else.

Shapes: B batch, T tokens, D hidden size, n sources, Q pseudo-queries scored at once, K sublayers.
"""

import functools
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

# Tokens are mixed in pieces that take up no more than this: larger allocations are given back to the system at once,
# and getting them again takes longer than filling them.
PIECE_BYTES = 1 << 23


class Norm(NamedTuple):
    """An RMSNorm: its gain `[D]`, what is added to the gain (1 in Gemma), and its epsilon."""

    weight: torch.Tensor
    offset: float
    eps: float

    def gain(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.weight if self.weight.dtype == dtype else self.weight.to(dtype)
        return weight + self.offset if self.offset else weight


def _exact(function):
    """Switches autocast off within a function: logits that are rounded to bfloat16 are off by 0.1 at 50."""

    @functools.wraps(function)
    def run(first, *others):
        kind = (first if isinstance(first, torch.Tensor) else others[0]).device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return function(first, *others)

    return run


@_exact
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
    product, norm = _product_and_norm(_wide(source), queries, eps)
    return product / norm


def _product_and_norm(source: torch.Tensor, queries: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    floor = _constant((source.shape[-1] * eps) ** 0.5, source.dtype, source.device)
    norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True)
    queries = _as(queries, source.dtype)
    product = nn.functional.linear(source, queries) if len(queries) > 1 else (source @ queries[0]).unsqueeze(-1)
    return product, torch.hypot(norm, floor)


def _wide(source: torch.Tensor) -> torch.Tensor:
    return source.float() if source.dtype.itemsize < 4 else source


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which even where there is nothing to do takes as long as an operation on one token."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_watched() -> bool:
    """Whether something looks at every operation: tracers, fake tensors and other dispatch modes, function transforms,
    forward-mode differentiation."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(value, dtype=dtype, device=device)
    if is_watched():  # a fake constant would outlive its mode
        return torch.tensor(float(value), dtype=dtype, device=device)
    return _kept_constant(value, dtype=dtype, device=device)


_kept_constant = lru_cache(maxsize=64)(torch.tensor)


class _Score(torch.autograd.Function):
    """Saves the source itself, where autograd would save a float32 copy of one that is narrower."""

    @staticmethod
    def forward(source: torch.Tensor, queries: torch.Tensor, eps: float):
        product, norm = _product_and_norm(_wide(source), queries, eps)
        return product / norm, norm

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
            by_source = by_product @ queries.to(gradient.dtype)
            by_source = torch.addcmul(by_source, by_norm, source, value=-1, out=_reuse(by_source))
            by_source = _as(by_source, source.dtype)
        if ctx.needs_input_grad[1]:
            flat = source.flatten(0, 1).to(gradient.dtype)
            by_queries = (by_product.flatten(0, 1).T @ flat).to(queries.dtype)
        return by_source, by_queries, None


def _reuse(tensor: torch.Tensor) -> torch.Tensor | None:
    """Where a result may be put: into a tensor that is done with, but not while gradients of gradients are recorded."""
    return None if torch.is_grad_enabled() else tensor


def weighted_sum(weights: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """sum_i weights_i * sources_i, float32 or wider: rounding every partial sum of many sources would cost more digits
    than all else.

    Args:
        weights: `[B, T, n]`, float32 or wider.
        sources: n tensors `[B, T, D]`.

    Returns:
        `[B, T, D]` in the dtype of the weights, a new tensor.
    """
    first, *others = weights.split(1, dim=-1)
    if len(sources) == 2:
        return torch.lerp(_wide(sources[1]), _wide(sources[0]), first)
    mixture = sources[0] * first
    for source, column in zip(sources[1:], others, strict=True):
        mixture.addcmul_(source, column)
    return mixture


def mixture(
    sources: tuple[torch.Tensor, ...],
    logits: torch.Tensor,
    query: torch.Tensor | None,
    eps: float,
    norm: Norm | None = None,
) -> torch.Tensor:
    """Softmax over the sources, their weighted sum without stacking them and, if wanted, the norm that follows.

    Args:
        sources: n tensors `[B, T, D]`; one only with a norm.
        logits: `[B, T, n]`, float32; with a query `[B, T, n - 1]`, without the last source's.
        query: `[1, D]`, the scaled pseudo-query that the last source is to be scored with.
        eps: epsilon of its key norm.
        norm: what the mixture is to be normed by.

    Returns:
        The mixture or what the norm makes of it, `[B, T, D]` in the dtype of the sources, rounded once.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Mixture.apply(logits, query, eps, *(norm or (None, 0.0, 0.0)), *sources)[0]
    if len(sources) == 2 and query is not None:
        mixed = _merge(*sources, logits, query, eps)
    else:
        mixed, _ = _mix(sources, logits, query, eps)
    if norm is not None:
        mixed = _normed(mixed, norm, in_place=mixed is not sources[0])
    return _as(mixed, sources[0].dtype)


def depth_weights(
    logits: torch.Tensor, last: torch.Tensor | None = None, query: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """The weights of a mixture, for those who want to see them: rows `[B, T, n]`, float32, that sum to 1.

    Args:
        logits: `[B, T, n]`, float32; with a query `[B, T, n - 1]`, without the last source's.
        last: the last source `[B, T, D]`, where there is a query.
        query, eps: as in `mixture`.
    """
    if query is not None:
        logits = torch.cat([logits, score(last, query, eps)], dim=-1)
    return torch.softmax(logits, dim=-1)


@_exact
def _mix(sources, logits, query, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixture, float32 or wider, and weights."""
    if len(sources) == 1:
        return _wide(sources[0]), torch.ones_like(logits)
    if query is not None:
        product, norm = _product_and_norm(_wide(sources[-1]), query, eps)
        logits = torch.cat([logits, product / norm], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    return weighted_sum(weights, sources), weights


@_exact
def _merge(first, last, logit, query, eps: float) -> torch.Tensor:
    """`_mix` of two in few operations: a softmax over two is a sigmoid of their difference."""
    wide = _wide(last)
    product, norm = _product_and_norm(wide, query, eps)
    share = torch.sigmoid(torch.addcdiv(logit, product, norm, value=-1))
    keep = wide is last or torch.compiler.is_compiling()
    return torch.lerp(wide, _wide(first), share, out=None if keep else wide)


def _inverse_rms(mixed: torch.Tensor, eps: float) -> torch.Tensor:
    length = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    return torch.addcmul(_constant(eps, mixed.dtype, mixed.device), length, length, value=1 / mixed.shape[-1]).rsqrt_()


def _normed(mixed: torch.Tensor, norm: Norm, in_place: bool) -> torch.Tensor:
    normed = torch.mul(mixed, _inverse_rms(mixed, norm.eps), out=mixed if in_place else None)
    return normed.mul_(norm.gain(mixed.dtype))


class _Mixture(torch.autograd.Function):
    """`mixture`. Saves the sources, with a norm the mixture in place of the first one, and the weights."""

    @staticmethod
    def forward(logits, query, eps: float, weight, offset: float, norm_eps: float, *sources):
        mixed, weights = _mix(sources, logits, query, eps)
        dtype = sources[0].dtype
        kept = _as(mixed, dtype)
        if weight is None:
            return kept, weights
        normed = _as(_normed(mixed, Norm(weight, offset, norm_eps), in_place=kept is not mixed), dtype)
        return (normed, weights) if len(sources) == 1 else (normed, weights, kept)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, query, ctx.eps, weight, ctx.offset, ctx.norm_eps, *sources = inputs
        first = sources[0] if weight is None or len(sources) == 1 else output[2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, weight, output[1], first, *sources[1:])

    @staticmethod
    def backward(ctx, given, by_weights, by_mixed=None):
        query, weight, weights, first, *others = ctx.saved_tensors
        dtype, first = first.dtype, _wide(first)
        columns = weights.split(1, dim=-1)
        gradient = torch.zeros_like(first) if given is None else _as(given, first.dtype)
        by_norm_weight = None
        # The gradient of the mixture is scale * gradient: what is the same for all of a token is multiplied later.
        scale = 1.0
        if weight is not None:
            norm = Norm(weight, ctx.offset, ctx.norm_eps)
            trained = ctx.needs_input_grad[3]
            gradient, scale, along_mixed, by_norm_weight = _normed_backward(gradient, first, norm, trained)
            if by_mixed is not None:  # of those who differentiate a gradient
                gradient, scale = scale * gradient + by_mixed, 1.0
                along_mixed = _dot(gradient, first)
        dots = [scale * _dot(gradient, _wide(source)) for source in others]
        if weight is None:
            dots.insert(0, _dot(gradient, first))
            along_mixed = sum(column * dot for column, dot in zip(columns, dots, strict=True))

        scored = columns[len(columns) - len(dots) :]
        by_logit = [column * (dot - along_mixed) for column, dot in zip(scored, dots, strict=True)]
        if weight is not None:
            by_logit.insert(0, -sum(by_logit) if others else torch.zeros_like(weights))
        by_logits = torch.cat(by_logit, dim=-1)
        if by_weights is not None:
            by_logits = by_logits + weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True))

        wanted = ctx.needs_input_grad[6:]
        by_sources = [
            gradient * (scale * column) if want else None for column, want in zip(columns[1:], wanted[1:], strict=True)
        ]
        by_query = None
        if query is not None:
            by_logits, by_own = by_logits.split([by_logits.shape[-1] - 1, 1], dim=-1)
            last = _wide(others[-1])
            product, length = _product_and_norm(last, query, ctx.eps)
            by_product = by_own / length
            if wanted[-1]:
                by_length = by_product * product / length.square()
                by_last = torch.addcmul(by_sources[-1], by_length, last, value=-1, out=_reuse(by_sources[-1]))
                by_sources[-1] = torch.addcmul(by_last, by_product, query.to(last.dtype), out=_reuse(by_last))
            if ctx.needs_input_grad[1]:
                by_query = (by_product.flatten(0, 1).T @ last.flatten(0, 1)).to(query.dtype)
        room = None if gradient is given else _reuse(gradient)
        by_first = torch.mul(gradient, scale * columns[0], out=room) if wanted[0] else None
        by_sources = [None if by is None else _as(by, dtype) for by in (by_first, *by_sources)]
        return by_logits, by_query, None, by_norm_weight, None, None, *by_sources


def _normed_backward(gradient: torch.Tensor, mixed: torch.Tensor, norm: Norm, trained: bool) -> tuple:
    """The gradient of what is normed as a new tensor `[B, T, D]` and its scale `[B, T, 1]`; its product with what is
    normed `[B, T, 1]`, which is small: but for the epsilon the norm does not see lengths; and that of the norm's
    weight `[D]`, if that is trained."""
    gain, inverse = norm.gain(mixed.dtype), _inverse_rms(mixed, norm.eps)
    product = (gradient * mixed).flatten(0, 1)
    along = (product @ gain).view(inverse.shape)
    by_weight = (inverse.flatten() @ product).to(norm.weight.dtype) if trained else None
    by_mixed = torch.mul(gradient, gain, out=_reuse(product.view(gradient.shape)))
    square = inverse.square()
    shrink = along * square / mixed.shape[-1]
    by_mixed = torch.addcmul(by_mixed, mixed, shrink, value=-1, out=_reuse(by_mixed))
    return by_mixed, inverse, along * inverse * square * norm.eps, by_weight


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Over D: `[B, T, D]` twice to `[B, T, 1]`."""
    return torch.einsum("btd,btd->bt", first, second).unsqueeze(-1)


def mix_together(logits: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same sources mixed for several sublayers at once, and their gradients gathered in one pass for all of them.

    Args:
        logits: of K sublayers, `[K, n, B, T]`, float32: a softmax over few numbers is fast only if they are apart.
        sources: n tensors `[B, T, D]`.

    Returns:
        The logarithms of the sums of the exponentials of the logits, `[K, B, T]`, which are the logits of the
        mixtures; and K mixtures `[B, T, D]`.
    """
    together, *mixtures = _MixTogether.apply(logits, *sources)
    return together, mixtures


class _MixTogether(torch.autograd.Function):
    """Saves the sources themselves and the weights; puts the sources of a few tokens at a time side by side."""

    @staticmethod
    def forward(logits: torch.Tensor, *sources: torch.Tensor):
        weights = _of_tokens(torch.softmax(logits, dim=1))
        mixtures = [_room(sources[0]) for _ in range(len(logits))]
        for piece, table in _pieces(sources, len(mixtures)):
            _spread(_sum_rows(table, weights[piece]), mixtures, piece)
        return torch.logsumexp(logits, dim=1), *mixtures

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, by_together, *by_mixtures):
        logits, *sources = ctx.saved_tensors
        weights = torch.softmax(logits, dim=1)
        of_tokens = _of_tokens(weights)
        by_mixtures = [torch.zeros_like(sources[0]) if by is None else by for by in by_mixtures]
        by_sources = [_room(source) for source in sources]
        dots = []
        for piece, gradients in _pieces(by_mixtures, len(sources)):
            table = _side_by_side(sources, piece)
            dots.append(gradients @ table.transpose(1, 2))
            _spread(_sum_rows(gradients, of_tokens[piece].transpose(1, 2)), by_sources, piece)
        dots = torch.cat(dots).permute(1, 2, 0).view(logits.shape)
        along = (weights * dots).sum(1, keepdim=True)
        by_logits = weights * (dots - along if by_together is None else dots - along + by_together.unsqueeze(1))
        return by_logits, *by_sources


def _room(state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)  # whatever the strides of the state


def _of_tokens(weights: torch.Tensor) -> torch.Tensor:
    """`[K, n, B, T]` to `[B T, K, n]`."""
    return weights.flatten(2).permute(2, 0, 1)


def _pieces(states: list[torch.Tensor], others: int):
    """A few tokens at a time: their slice and `[tokens, number of states, D]`, float32 or wider."""
    batch, tokens, hidden_size = states[0].shape
    length = max(1, PIECE_BYTES // (4 * hidden_size * (len(states) + others)))
    for start in range(0, batch * tokens, length):
        piece = slice(start, min(start + length, batch * tokens))
        yield piece, _side_by_side(states, piece)


def _side_by_side(states: list[torch.Tensor], piece: slice) -> torch.Tensor:
    return _wide(torch.stack([state.flatten(0, 1)[piece] for state in states], dim=1))


def _spread(values: torch.Tensor, states: list[torch.Tensor], piece: slice):
    """The inverse."""
    for value, state in zip(values.unbind(1), states, strict=True):
        state.view(-1, state.shape[-1])[piece] = value


def _sum_rows(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`[T, n, D]` and `[T, K, n]` to `[T, K, D]`: what all sums take from a token is read from memory once."""
    tokens, sums, count = weights.shape
    rows = torch.arange(tokens * count).view(tokens, 1, count).expand(tokens, sums, count).reshape(-1)
    offsets = torch.arange(0, len(rows), count)
    table, weights = table.flatten(0, 1), weights.reshape(-1)
    return torch.embedding_bag(table, rows, offsets, mode=0, per_sample_weights=weights)[0].view(tokens, sums, -1)
