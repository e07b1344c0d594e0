"""The Triton kernels of the mixing over depth, launched by `triton_backend`.

A row is a token of a sequence. One program holds a whole row of D elements in registers, padded to BLOCK, and reads the
sources one after the other. They are a tuple of pointers, unrolled at compile time; one launch takes one group of them.

The kernels are limited by registers. This is why `row * D + offsets` is in parentheses (one index for all sources) and
why the row count has 32 bits: otherwise compilers keep an address per source.

Shapes: R rows, D hidden size, n sources.
"""

# ruff: noqa: RUF005  Triton's compiler knows `a + (b,)`, not `(*a, b)`

import triton
import triton.language as tl

NORMAL = tl.constexpr("")  # the default eviction policy


@triton.jit
def _load(pointer, row, offsets, D: tl.constexpr, EVICTION: tl.constexpr = NORMAL):
    """Loads a row of `[R, D]` in its own dtype, padded with zeros."""
    return tl.load(pointer + (row * D + offsets), mask=offsets < D, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _store(pointer, row, offsets, value, D: tl.constexpr):
    tl.store(pointer + (row * D + offsets), value.to(pointer.dtype.element_ty), mask=offsets < D)


@triton.jit
def _sums(first, second):
    """Returns two sums over a row at the cost of one synchronization between warps."""
    return tl.split(tl.sum(tl.join(first, second), axis=0))


@triton.jit
def _inverse_rms(value, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)


@triton.jit
def _add_weighted(total, sources, weights, scale, row, offsets, D: tl.constexpr):
    """Adds the scaled sources of a group to a row; `weights` points to the weight of the first."""
    for i in tl.static_range(len(sources)):
        # The sources are read once more later. With equal policies the compiler might keep them in registers instead.
        value = _load(sources[i], row, offsets, D, "evict_last")
        total += scale * tl.load(weights + i) * value.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["start", "n"])
def mix_forward(
    sources,  # of this group, [R, D] each
    query,  # [D] float32
    norm_weight,  # [D] or None
    output,  # [R, D], written by the last group
    weights,  # [R, n] float32: logits until the last group is done
    carry,  # [R, D] float32: the mixture of the earlier groups; None if there is one group
    start,  # index of the group's first source
    n,
    eps,
    norm_offset,
    norm_eps,
    scale,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least D
    WIDTH: tl.constexpr,  # power of two, at least n
):
    """Mixes and norms by a softmax with a running maximum, which reads each source once."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    own_weights = weights + row * n
    pseudo_query = _load(query, 0, offsets, D)

    if FIRST:
        top = float("-inf")
        total = 0.0
        mixed = tl.zeros((BLOCK,), tl.float32)
    else:
        earlier = tl.load(own_weights + columns, mask=columns < start, other=float("-inf"))
        top = tl.max(earlier, axis=0)
        total = tl.sum(tl.exp(earlier - top), axis=0)
        mixed = _load(carry, row, offsets, D)

    logits = ()
    following = _load(sources[0], row, offsets, D)
    for i in tl.static_range(len(sources)):
        value = following.to(tl.float32)
        if i + 1 < len(sources):  # is loaded while this one is reduced
            following = _load(sources[i + 1], row, offsets, D)
        dot, square = _sums(pseudo_query * value, value * value)
        logit = dot * tl.rsqrt(square / D + eps)
        new_top = tl.maximum(top, logit)
        kept = tl.exp(top - new_top)
        share = tl.exp(logit - new_top)
        total = total * kept + share
        mixed = mixed * kept + share * value
        top = new_top
        logits = logits + (logit,)

    if LAST:
        mixed *= scale / total
        if norm_weight is not None:
            gain = _load(norm_weight, 0, offsets, D).to(tl.float32) + norm_offset
            mixed *= gain * _inverse_rms(mixed, norm_eps, D)
        _store(output, row, offsets, mixed, D)
        for i in tl.static_range(len(sources)):
            tl.store(own_weights + start + i, tl.exp(logits[i] - top) / total)
        if not FIRST:
            tl.store(own_weights + columns, tl.exp(earlier - top) / total, mask=columns < start)
    else:
        _store(carry, row, offsets, mixed, D)
        for i in tl.static_range(len(sources)):
            tl.store(own_weights + start + i, logits[i])


@triton.jit(do_not_specialize=["start", "n"])
def add_sources(
    sources,  # of this group, [R, D] each
    weights,  # [R, n] float32
    mixture,  # [R, D] float32, overwritten by the first group
    start,
    n,
    scale,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the mixture of more sources than one launch takes, for the launches of `mix_backward`."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mixed = tl.zeros((BLOCK,), tl.float32) if FIRST else _load(mixture, row, offsets, D)
    mixed = _add_weighted(mixed, sources, weights + row * n + start, scale, row, offsets, D)
    _store(mixture, row, offsets, mixed, D)


@triton.jit(do_not_specialize=["start", "n", "num_rows"])
def mix_backward(
    sources,  # of this group, [R, D] each
    gradients,  # of these sources, [R, D] each; None for a source without a gradient
    query,  # [D] float32
    norm_weight,  # [D] or None
    weights,  # [R, n] float32
    mixture,  # [R, D] float32; None if there is one group, which mixes its sources itself
    output_gradient,  # [R, D]
    weights_gradient,  # [R, n] float32 or None
    query_parts,  # [programs, D] float32: the sum over each program's rows
    norm_parts,  # the same for the norm's weight, rewritten by every group; None without a norm
    start,
    n,
    num_rows,
    eps,
    norm_offset,
    norm_eps,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Computes the gradients of a group's sources, and parts of those of the query and the norm's weight."""
    offsets = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    pseudo_query = _load(query, 0, offsets, D)
    query_sum = tl.zeros((BLOCK,), tl.float32)
    norm_sum = tl.zeros((BLOCK,), tl.float32)

    index = tl.program_id(0)
    while index < num_rows:  # the interpreter of Triton 3.6 fails on `range` with a recent numpy
        row = index.to(tl.int64)
        own_weights = weights + row * n
        if mixture is None:
            mixed = tl.zeros((BLOCK,), tl.float32)
            mixed = _add_weighted(mixed, sources, own_weights, scale, row, offsets, D)
        else:
            mixed = _load(mixture, row, offsets, D)

        gradient = _load(output_gradient, row, offsets, D).to(tl.float32)  # of the output, then of the mixture
        if norm_weight is not None:
            inverse_rms = _inverse_rms(mixed, norm_eps, D)
            normed = mixed * inverse_rms
            norm_sum += gradient * normed
            gradient *= _load(norm_weight, 0, offsets, D).to(tl.float32) + norm_offset
            gradient = inverse_rms * (gradient - normed * (tl.sum(gradient * normed, axis=0) / D))

        # sum_j w_j c_j, where c_j is the gradient of weight j: the part of gradient . v_j sums to gradient . mixture
        mean_change = tl.sum(gradient * mixed, axis=0)
        gradient *= scale
        if weights_gradient is not None:
            own_gradients = weights_gradient + row * n
            weight = tl.load(own_weights + columns, mask=columns < n, other=0.0)
            mean_change += tl.sum(weight * tl.load(own_gradients + columns, mask=columns < n, other=0.0), axis=0)

        following = _load(sources[len(sources) - 1], row, offsets, D, "evict_first")
        for i in tl.static_range(len(sources) - 1, -1, -1):  # the sources read last are most likely still cached
            value = following.to(tl.float32)
            if i > 0:
                following = _load(sources[i - 1], row, offsets, D, "evict_first")
            zeros = tl.zeros((BLOCK,), tl.float32)
            score, changes = _sums(tl.join(pseudo_query * value, value * value), tl.join(gradient * value, zeros))
            dot, square = tl.split(score)
            change, _ = tl.split(changes)
            inverse_rms = tl.rsqrt(square / D + eps)
            if weights_gradient is not None:
                change += tl.load(own_gradients + start + i)
            weight = tl.load(own_weights + start + i)
            slope = weight * (change - mean_change) * inverse_rms
            query_sum += slope * value
            if gradients[i] is not None:
                pull = dot * inverse_rms * inverse_rms / D
                _store(gradients[i], row, offsets, weight * gradient + slope * (pseudo_query - pull * value), D)
        index += tl.num_programs(0)

    program = tl.program_id(0).to(tl.int64)
    _store(query_parts, program, offsets, query_sum, D)
    if norm_weight is not None:
        _store(norm_parts, program, offsets, norm_sum, D)
