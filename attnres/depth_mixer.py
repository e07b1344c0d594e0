"""The mixing over depth: pseudo-queries, key norms, scores and weighted sums (paper, sections 3.1 and 3.2).

    h_l = sum_i a_{i->l} v_i,     a_{.->l} = softmax_i( w_l . RMSNorm_l(v_i) )

w_l is the pseudo-query of sublayer l, RMSNorm_l its key norm with a gain of its own, v_i the sources. Pseudo-queries
are parameters, so the logits of a source for all later sublayers are known the moment the source is complete: one
matrix product per source ("score on commit"). A sublayer then only has to softmax a few small logits and to mix.

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources, Q pseudo-queries scored at once.
"""

import importlib
import math
import warnings
from functools import lru_cache

import numpy as np
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
        attention, mlp, output = self.attention_norm(), self.mlp_norm(), self.output_norm()
        device = attention.device  # a device map may part the three
        sublayers = torch.stack([attention, mlp.to(device)], dim=1).flatten(0, 1)
        queries = torch.cat([sublayers, output.to(device).unsqueeze(0)])
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
    return nn.functional.linear(source, _as(queries, source.dtype)), torch.hypot(norm, floor)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which even where there is nothing to do takes as long as an operation on one token."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
    """Summed in float32: rounding every partial sum of many sources would cost more digits than all else."""
    first, *others = weights.split(1, dim=-1)
    mixture = sources[0] * first
    for source, column in zip(sources[1:], others, strict=True):
        mixture.addcmul_(source, column)
    return _as(mixture, sources[0].dtype)


def mix_bank(bank: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The same sources mixed for several sublayers at once; without autograd.

    Args:
        bank: n sources side by side, `[n, B, T, D]`.
        logits: of K sublayers, `[K, n, B, T]`, float32: a softmax over few numbers is fast only if they are apart.

    Returns:
        `[B, T, K, D]` in the dtype of the bank. One pass over the sources for all sublayers, summed in float32: what
        the sublayers take from a token is read from memory once, as their mixtures are neighbours.
    """
    sublayers, count, batch, tokens = logits.shape
    if count == 1:
        return bank[0].unsqueeze(2).expand(-1, -1, sublayers, -1)
    weights = torch.softmax(logits, dim=1).to(bank.dtype).permute(2, 3, 0, 1).reshape(-1)
    rows, offsets = _bags(sublayers, batch * tokens, count)
    mixtures = torch.embedding_bag(bank.flatten(0, 2), rows, offsets, mode=0, per_sample_weights=weights)[0]
    return mixtures.view(batch, tokens, sublayers, -1)


def _bags(sublayers: int, tokens: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a flat bank that belong to each token and sublayer, and where each one's rows begin."""
    make = _few_bags if sublayers * tokens <= FEW_BAGS else _new_bags
    return make(sublayers, tokens, count)


def _new_bags(sublayers: int, tokens: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(count) * tokens + torch.arange(tokens).view(-1, 1, 1)
    return rows.expand(tokens, sublayers, count).reshape(-1), torch.arange(0, sublayers * tokens * count, count)


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
        logits: `[B, T, n]`, float32; with a query `[B, T, n - 1]`, without the last source's; or, for one token, two
            sources and a query, the number that it is.
        query: `[1, D]`, the scaled pseudo-query that the last source is to be scored with; numpy's `[D]` where the
            logits are a number.
        eps: epsilon of its key norm.
        return_weights: whether the depth weights are wanted.

    Returns:
        The mixture `[B, T, D]` in the dtype of the sources and, if wanted, the depth weights `[B, T, n]`, float32.
    """
    if isinstance(logits, float):
        return _merge_token(*sources, logits, query, eps), None
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
    return torch.lerp(last, first, _as(share_of_first, last.dtype))


def token_vector(source: torch.Tensor) -> np.ndarray:
    """A source of one token as a vector `[D]` of numpy, float32 or wider. While decoding, the weights that stream past
    leave nothing in the cache: numpy's short way to a dot product takes half the time of torch's."""
    return (source.float() if source.dtype.itemsize < 4 else source).numpy().ravel()


def score_token(vector: np.ndarray, queries: np.ndarray, eps: float) -> list[float]:
    """`score` for one token: Q numbers for a source `[D]` and scaled pseudo-queries `[Q, D]`."""
    norm = math.sqrt(vector.dot(vector).item() + vector.shape[0] * eps)
    return [product / norm for product in queries.dot(vector).tolist()]


def _merge_token(first: torch.Tensor, last: torch.Tensor, logit: float, query: np.ndarray, eps: float):
    """`_merge` for one token: numbers of Python cost less than tensors of one number."""
    vector = token_vector(last)
    norm = math.sqrt(vector.dot(vector).item() + vector.shape[0] * eps)
    own = vector.dot(query).item() / norm
    return torch.lerp(last, first, 1 / (1 + math.exp(min(own - logit, 700.0))))  # beyond, exp overflows


def mix_triton(sources, logits, query, eps, return_weights):
    """`mix_eager` by the kernels of the package; where they do not work, eager after one warning that says why."""
    device = sources[0].device
    problem = _triton_problem(device.type, device.index)
    if problem is not None:
        _warn_once(f'depth_implementation="triton" mixes by "eager" instead: {problem}')
    if problem is not None or sources[0].dtype == torch.float64:
        return mix_eager(sources, logits, query, eps, return_weights)
    query = None if query is None else query[0] * query.shape[-1] ** -0.5
    mixture, weights = torch.ops.attnres.mix(list(sources), logits, query, eps)
    return mixture, weights if return_weights else None


def mix_auto(sources, logits, query, eps, return_weights):
    """By Triton on CUDA, by eager elsewhere."""
    chosen = mix_triton if isinstance(logits, torch.Tensor) and logits.device.type == "cuda" else mix_eager
    return chosen(sources, logits, query, eps, return_weights)


@torch.compiler.assume_constant_result
def _triton_problem(device_type: str, device_index: int | None) -> str | None:
    """Why the kernels cannot be used on a device, found out once; `None` where they can."""
    try:
        # By name: in a Hub folder these files stand alone, and a relative import would make the folder look for it.
        kernels = importlib.import_module("attnres.kernels.mix_triton")
    except ImportError as error:
        return f"{' '.join(str(error).split())}; pip install attnres[triton]"
    if device_type not in kernels.DEVICES and not kernels.INTERPRETED:
        return f"its kernels run on {' and '.join(kernels.DEVICES)}, not on {device_type}"
    return kernels.self_check(torch.device(device_type, device_index))


@torch.compiler.assume_constant_result
@lru_cache
def _warn_once(message: str):
    warnings.warn(message, stacklevel=2)


DEPTH_IMPLEMENTATIONS = {"auto": mix_auto, "eager": mix_eager, "triton": mix_triton}


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
