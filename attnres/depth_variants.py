"""Variants of the mixing over depth: the paper's ablations and related methods, one function each.

A variant takes the n sources v of a sublayer, stacked to `[B, T, n, D]`, its pseudo-query times the gain of its key
norm `[D]`, the variant's own parameters for this sublayer (`extra`, or `None`) and the epsilon of the key norm. It
returns the mixture `[B, T, D]` and the depth weights `[B, T, n]`. All are float32 or wider. The functions are plain
torch, written to be read and compared rather than to be fast.

Shapes: B batch, T tokens, D hidden size, n sources, H heads, R = 2 L + 1 (two sublayers per decoder layer, the output).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

HEADS = 16  # of "multi_head" (paper, table 4)
WINDOW = 8  # sources that "sliding_window" keeps besides the embedding (paper, table 4)
STREAMS = 4  # residual streams of "mhc"
SINKHORN_STEPS = 20

Mixture = tuple[torch.Tensor, torch.Tensor]


def rms_norm(values: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns v / sqrt(mean(v^2) + eps), the mean over the last dimension."""
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


def _logits(values: torch.Tensor, query: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns w . RMSNorm(v_i), `[B, T, n]`."""
    return (rms_norm(values, eps) * query).sum(-1)


def _mix(weights: torch.Tensor, values: torch.Tensor) -> Mixture:
    return (weights.unsqueeze(-1) * values).sum(2), weights


def input_dependent_query(values, query, extra, eps) -> Mixture:
    """a = softmax_i((w + W x) . RMSNorm(v_i)), where x is the newest source, normed, and W `[D, D]` starts at zero."""
    keys = rms_norm(values, eps)
    queries = query + torch.einsum("...d,ed->...e", keys[:, :, -1], extra.to(query.dtype))
    return _mix(torch.softmax((keys * queries.unsqueeze(2)).sum(-1), dim=-1), values)


def static(values, query, extra, eps) -> Mixture:
    """a = softmax_i(b_i) with learned scalars b `[R]`, the same for all tokens."""
    weights = torch.softmax(extra[: values.shape[2]].to(query.dtype), dim=-1)
    return _mix(weights.expand(values.shape[:-1]), values)


def sigmoid(values, query, extra, eps) -> Mixture:
    """a_i = sigmoid(w . RMSNorm(v_i)): the weights do not compete and do not sum to 1."""
    return _mix(torch.sigmoid(_logits(values, query, eps)), values)


def no_key_norm(values, query, extra, eps) -> Mixture:
    """a = softmax_i(w . v_i): sources with a large norm get large weights."""
    return _mix(torch.softmax((values * query).sum(-1), dim=-1), values)


def sliding_window(values, query, extra, eps) -> Mixture:
    """Attends to the embedding and the last 8 sources only; the other weights are 0."""
    place = torch.arange(values.shape[2], device=values.device)
    outside = (place > 0) & (place < len(place) - WINDOW)
    logits = _logits(values, query, eps).masked_fill(outside, float("-inf"))
    return _mix(torch.softmax(logits, dim=-1), values)


def multi_head(values, query, extra, eps) -> Mixture:
    """Splits the channels into 16 heads, each with weights from its own part of query and keys; returns their mean."""
    products = (rms_norm(values, eps) * query).unflatten(-1, (HEADS, -1))
    weights = torch.softmax(products.sum(-1), dim=2)  # [B, T, n, H]
    mixture = (weights.unsqueeze(-1) * values.unflatten(-1, (HEADS, -1))).sum(2).flatten(-2)
    return mixture, weights.mean(-1)


def denseformer(values, query, extra, eps) -> Mixture:
    """a_i = b_i with learned scalars b `[R]` of either sign that start at 1, as plain residuals."""
    return _mix(extra[: values.shape[2]].to(query.dtype).expand(values.shape[:-1]), values)


def null_source(values, query, extra, eps) -> Mixture:
    """Adds one logit, 0, for a source of zeros to the softmax, so that a sublayer can attend to nothing."""
    weights = torch.softmax(F.pad(_logits(values, query, eps), (0, 1)), dim=-1)
    return _mix(weights[..., :-1], values)


def delta(values, query, extra, eps) -> Mixture:
    """h = sum_i v_i + g sum_i a_i v_i: the residual stream plus attention behind a learned scalar g that starts at 0.

    The attention leaves out the embedding, whose weight is 0.
    """
    logits = _logits(values, query, eps)
    if values.shape[2] == 1:
        return values[:, :, 0] + 0 * logits, torch.zeros_like(logits)
    first = torch.zeros_like(logits[..., :1])
    weights = torch.cat([first, torch.softmax(logits[..., 1:], dim=-1)], dim=-1)
    mixture, weights = _mix(weights, values)
    return values.sum(2) + extra.to(query.dtype) * mixture, weights


def read_streams(streams: torch.Tensor, extra: torch.Tensor, eps: float, dtype: torch.dtype):
    """Reads a sublayer's input from the 4 residual streams X of mHC, and computes how they are updated afterwards.

    h = H_pre X,  X' = H_res X + H_post f(h). Each H is computed from RMSNorm(vec(X)) P + b: H_pre by a sigmoid, H_post
    by twice a sigmoid, and H_res, a doubly stochastic matrix, by 20 Sinkhorn steps.

    Args:
        streams: X, `[B, T, 4, D]`.
        extra: P and b of this sublayer in one tensor, `[4 D + 1, 24]`.
        eps: epsilon of the RMSNorm.
        dtype: the dtype to compute in.

    Returns:
        h `[B, T, D]`, H_pre `[B, T, 4]`, and the pair of H_post `[B, T, 4]` and H_res `[B, T, 4, 4]`.
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
    """Returns X' = H_res X + H_post output, `[B, T, 4, D]` in the dtype of the streams."""
    post, mix = maps
    kept = (mix.unsqueeze(-1) * streams.to(mix.dtype).unsqueeze(2)).sum(3)
    return (kept + post.unsqueeze(-1) * output.to(mix.dtype).unsqueeze(2)).to(streams.dtype)


def _stream_maps(rows: int, size: int) -> torch.Tensor:
    """Returns the initial P and b of mHC, `[R, 4 D + 1, 24]`, with which equal streams compute plain residuals.

    Sublayer l reads stream l mod 4, and all streams take its output without mixing. Because different sublayers read
    different streams, training can tell the streams apart.
    """
    maps = torch.zeros(rows, STREAMS * size + 1, 2 * STREAMS + STREAMS**2)
    bias = maps[:, -1]
    others = torch.full((STREAMS,), -8.0)
    chosen = 1 - 3 * torch.sigmoid(others[0])  # the weights of the four streams sum to 1
    bias[:, :STREAMS] = others
    for row in range(rows):
        bias[row, row % STREAMS] = torch.log(chosen / (1 - chosen))
    bias[:, 2 * STREAMS :] = (8 * torch.eye(STREAMS)).flatten()
    return maps


@dataclass(frozen=True)
class Variant:
    """One way of mixing over depth."""

    # The publication it comes from.
    source: str
    # The function; `None` for residual streams and for the paper's mixture, which has `attention_residual` and kernels.
    mixture: Callable[..., Mixture] | None = None
    # Returns the initial values `[R, ...]` of the variant's own parameters, given R and D.
    initial: Callable[[int, int], torch.Tensor] | None = None
    # Returns the factor that makes an initial mixture of n sources their sum, given n. `None`: there is no such factor,
    # and a converted model does not start as the plain one.
    lossless: Callable[[int], float] | None = float
    # Replaces a block representation or, in "full" mode, a sublayer output, given it and epsilon.
    complete: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    # The number of residual streams that take the place of sources.
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
    "rms_block": Variant("public replications: normed block outputs", lossless=None, complete=rms_norm),
    "null_source": Variant("public replications: softmax with an extra zero", null_source, lossless=lambda n: n + 1.0),
    "delta": Variant("public replications", delta, lambda rows, size: torch.zeros(rows), lambda n: 1.0),
    "mhc": Variant("Xie et al., arXiv 2512.24880", None, _stream_maps, lambda n: 1.0, streams=STREAMS),
}


def check_variant(variant: str, hidden_size: int):
    """Checks that a variant exists and fits the hidden size."""
    if variant not in VARIANTS:
        raise ValueError(f"depth_variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if variant == "multi_head" and hidden_size % HEADS:
        raise ValueError(
            f"depth_variant='multi_head' splits the channels into {HEADS} heads: hidden_size must be a multiple of "
            f"{HEADS}, got {hidden_size}. Choose another hidden_size or another variant."
        )
