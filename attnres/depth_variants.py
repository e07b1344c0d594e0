"""Variants of the mixing over depth, one function each: the paper's ablations and related methods.

Each takes the n sources `[B, T, D]` of a sublayer, its pseudo-query times the gain of the key norm `[D]`, what it
learns besides, and the epsilon of the key norm, and returns the mixture `[B, T, D]` and the weights `[B, T, n]`, both
in the dtype of the query. They are written to be read and compared, not to be fast: all run as plain torch functions.

Shapes: B batch, T tokens, D hidden size, n sources, H heads, R = 2 L + 1 sublayers and the output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

HEADS = 16  # the paper's table 4
WINDOW = 8  # the paper's table 4: the embedding and the last 8
STREAMS = 4  # mHC
SINKHORN_STEPS = 20

Mixture = tuple[torch.Tensor, torch.Tensor]


def _values(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`[B, T, n, D]`."""
    return torch.stack(tuple(sources), dim=2).to(dtype)


def rms_norm(values: torch.Tensor, eps: float) -> torch.Tensor:
    """v / sqrt(mean(v^2) + eps) over the last dimension."""
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


def _mix(weights: torch.Tensor, values: torch.Tensor) -> Mixture:
    return (weights.unsqueeze(-1) * values).sum(2), weights


def input_dependent_query(sources, query, extra, eps) -> Mixture:
    """softmax_i((w + W x) . RMSNorm(v_i)) with x the newest source, normed, and W `[D, D]` from zero."""
    values = _values(sources, query.dtype)
    keys = rms_norm(values, eps)
    queries = query + torch.einsum("...d,ed->...e", keys[:, :, -1], extra.to(query.dtype))
    return _mix(torch.softmax((keys * queries.unsqueeze(2)).sum(-1), dim=-1), values)


def static(sources, query, extra, eps) -> Mixture:
    """softmax_i(b_i) with learned scalars b `[R]`, the same for all tokens."""
    values = _values(sources, query.dtype)
    weights = torch.softmax(extra[: len(sources)].to(query.dtype), dim=-1)
    return _mix(weights.expand(values.shape[:-1]), values)


def sigmoid(sources, query, extra, eps) -> Mixture:
    """sigmoid(w . RMSNorm(v_i)): weights that do not compete, and do not sum to 1."""
    values = _values(sources, query.dtype)
    return _mix(torch.sigmoid((rms_norm(values, eps) * query).sum(-1)), values)


def no_key_norm(sources, query, extra, eps) -> Mixture:
    """softmax_i(w . v_i): sources of large norm draw attention by their size."""
    values = _values(sources, query.dtype)
    return _mix(torch.softmax((values * query).sum(-1), dim=-1), values)


def sliding_window(sources, query, extra, eps) -> Mixture:
    """Attention over the embedding and the last 8 sources; the weights of the others are 0."""
    values = _values(sources, query.dtype)
    logits = (rms_norm(values, eps) * query).sum(-1)
    place = torch.arange(len(sources), device=logits.device)
    outside = (place > 0) & (place < len(sources) - WINDOW)
    return _mix(torch.softmax(logits.masked_fill(outside, float("-inf")), dim=-1), values)


def multi_head(sources, query, extra, eps) -> Mixture:
    """16 heads, each with the weights that its own D / 16 channels of query and keys give. Reports their mean."""
    values = _values(sources, query.dtype)
    products = (rms_norm(values, eps) * query).unflatten(-1, (HEADS, -1))
    weights = torch.softmax(products.sum(-1), dim=2)  # [B, T, n, H]
    mixture = (weights.unsqueeze(-1) * values.unflatten(-1, (HEADS, -1))).sum(2).flatten(-2)
    return mixture, weights.mean(-1)


def denseformer(sources, query, extra, eps) -> Mixture:
    """sum_i b_i v_i with learned scalars b `[R]` from 1, of either sign: plain residuals at the start."""
    values = _values(sources, query.dtype)
    return _mix(extra[: len(sources)].to(query.dtype).expand(values.shape[:-1]), values)


def null_source(sources, query, extra, eps) -> Mixture:
    """Softmax with one more logit, 0, whose source is 0: a sublayer may attend to nothing."""
    values = _values(sources, query.dtype)
    logits = (rms_norm(values, eps) * query).sum(-1)
    weights = torch.softmax(torch.nn.functional.pad(logits, (0, 1)), dim=-1)[..., :-1]
    return _mix(weights, values)


def attention(sources, query, extra, eps) -> Mixture:
    """softmax_i(w . RMSNorm(v_i)), the mixture of `attention_residual`; the variant changes the sources."""
    values = _values(sources, query.dtype)
    return _mix(torch.softmax((rms_norm(values, eps) * query).sum(-1), dim=-1), values)


def delta(sources, query, extra, eps) -> Mixture:
    """h = x + g sum_i a_i v_i: the residual stream x, the sum of all sources, and attention over all but the embedding
    behind a learned scalar g from 0. The weights are those of the attention; the embedding's is 0."""
    values = _values(sources, query.dtype)
    logits = (rms_norm(values, eps) * query).sum(-1)
    if len(sources) == 1:
        return values[:, :, 0] + 0 * logits, torch.zeros_like(logits)
    first = torch.zeros_like(logits[..., :1])
    weights = torch.cat([first, torch.softmax(logits[..., 1:], dim=-1)], dim=-1)
    mixture, weights = _mix(weights, values)
    return values.sum(2) + extra.to(query.dtype) * mixture, weights


def read_streams(streams: torch.Tensor, extra: torch.Tensor, eps: float, dtype: torch.dtype):
    """mHC: what a sublayer reads from 4 residual streams, and how its output and the streams are put together again.

    h = H_pre X,  X' = H_res X + H_post f(h), each H from RMSNorm(vec(X)) P + b: a sigmoid, twice a sigmoid, and a
    doubly stochastic matrix by 20 Sinkhorn steps.

    Args:
        streams: X, `[B, T, 4, D]`.
        extra: P and b of this sublayer in one, `[4 D + 1, 24]`.

    Returns:
        h `[B, T, D]`, H_pre `[B, T, 4]`, and (H_post `[B, T, 4]`, H_res `[B, T, 4, 4]`).
    """
    extra, values = extra.to(dtype), streams.to(dtype)
    maps = torch.einsum("...d,de->...e", rms_norm(values.flatten(-2), eps), extra[:-1]) + extra[-1]
    pre, post, mix = maps.split([STREAMS, STREAMS, STREAMS**2], dim=-1)
    pre, post, mix = torch.sigmoid(pre), 2 * torch.sigmoid(post), mix.unflatten(-1, (STREAMS, STREAMS))
    for _ in range(SINKHORN_STEPS):  # on logarithms, which cannot overflow
        mix = mix - mix.logsumexp(-2, keepdim=True)
        mix = mix - mix.logsumexp(-1, keepdim=True)
    return (pre.unsqueeze(-1) * values).sum(2), pre, (post, mix.exp())


def write_streams(streams: torch.Tensor, output: torch.Tensor, maps: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """H_res X + H_post output, `[B, T, 4, D]` in the dtype of the streams."""
    post, mix = maps
    kept = (mix.unsqueeze(-1) * streams.to(mix.dtype).unsqueeze(2)).sum(3)
    return (kept + post.unsqueeze(-1) * output.to(mix.dtype).unsqueeze(2)).to(streams.dtype)


def _stream_maps(rows: int, size: int) -> torch.Tensor:
    """Sublayer l reads stream l mod 4, all streams take its output and keep apart: equal streams compute plain
    residuals, and what reads them differs, so that training can tell them apart."""
    maps = torch.zeros(rows, STREAMS * size + 1, 2 * STREAMS + STREAMS**2)
    bias = maps[:, -1]
    others = torch.full((STREAMS,), -8.0)
    chosen = 1 - 3 * torch.sigmoid(others[0])  # what is read from all four adds up to 1
    bias[:, :STREAMS] = others
    for row in range(rows):
        bias[row, row % STREAMS] = torch.log(chosen / (1 - chosen))
    bias[:, 2 * STREAMS :] = (8 * torch.eye(STREAMS)).flatten()
    return maps


@dataclass(frozen=True)
class Variant:
    """One way of mixing over depth.

    Attributes:
        source: where it comes from.
        mixture: the function.
        initial: what it learns besides pseudo-queries, before training: of R and D a tensor `[R, ...]`.
        lossless: of n the number by which a mixture has to be multiplied to be the sum of its sources at the start;
            `None`: it cannot start as what a plain model computes.
        complete: what becomes of a block representation or, in "full" mode, a sublayer output; of it and epsilon.
        streams: residual streams in place of sources.
    """

    source: str
    mixture: Callable[..., Mixture] | None = None
    initial: Callable[[int, int], torch.Tensor] | None = None
    lossless: Callable[[int], float] | None = float
    complete: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    streams: int = 0


def _square(fill: float):
    return lambda rows, size: torch.full((rows, rows), fill)


VARIANTS = {
    "attnres": Variant("paper, section 3"),
    "input_dependent_query": Variant(
        "paper, table 4", input_dependent_query, lambda rows, size: torch.zeros(rows, size, size)
    ),
    "static": Variant("paper, table 4: input-independent mixing", static, _square(0.0)),
    "sigmoid": Variant("paper, table 4", sigmoid, lossless=lambda n: 2.0),
    "no_key_norm": Variant("paper, table 4", no_key_norm),
    "sliding_window": Variant("paper, table 4: embedding and last 8", sliding_window, lossless=None),
    "multi_head": Variant("paper, table 4: 16 heads over channels", multi_head),
    "denseformer": Variant("Pagliardini et al., arXiv 2402.02622", denseformer, _square(1.0), lambda n: 1.0),
    "rms_block": Variant(
        "public replications: RMS-normalised block outputs", attention, lossless=None, complete=rms_norm
    ),
    "null_source": Variant("public replications: softmax with an extra zero", null_source, lossless=lambda n: n + 1.0),
    "delta": Variant(
        "public replications: retrofit with an identity start",
        delta,
        lambda rows, size: torch.zeros(rows),
        lambda n: 1.0,
    ),
    "mhc": Variant("Xie et al., arXiv 2512.24880", None, _stream_maps, lambda n: 1.0, streams=STREAMS),
}


def check_variant(variant: str, hidden_size: int):
    """Raises ValueError if there is no such variant, or not for this hidden size."""
    if variant not in VARIANTS:
        raise ValueError(f"depth_variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if variant == "multi_head" and hidden_size % HEADS:
        raise ValueError(
            f"depth_variant='multi_head' divides the channels among {HEADS} heads: hidden_size must be a multiple of "
            f"{HEADS}, got {hidden_size}. Choose another hidden_size or variant."
        )


def lossless_scale(variant: str, count: int) -> float:
    """By what a mixture of n sources is multiplied to be their sum at the start; 1 where it cannot be."""
    lossless = VARIANTS[variant].lossless
    return 1.0 if lossless is None else lossless(count)
