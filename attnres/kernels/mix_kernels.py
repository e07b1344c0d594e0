"""The Triton kernels of the mixing over depth; `mix_triton` launches them and registers them with PyTorch.

    w = softmax(logits),    mixture = sum_i w_i v_i

One program handles one row (a token of a sequence) and walks along D in tiles `[LANES, VECTOR]`: a thread loads VECTOR
adjacent elements of each source at once, and the sum of a tile over its second dimension stays within the thread.

Sources are a tuple of pointers, unrolled at compile time. A launch takes one group of them: FIRST and LAST say whether
it is the first and the last one of the mixture. Between groups the forward pass carries a float32 sum, the backward
pass the dot products of the earlier sources.

With a query the last source comes without a logit: logit = (query . v) / sqrt(mean(v^2) + eps).

Shapes: R rows, D hidden size, n sources, m logits that are given (n, or n - 1 with a query).
"""

# ruff: noqa: RUF005  Triton's compiler knows `a + (b,)`, not `(*a, b)`

import triton
import triton.language as tl


@triton.jit
def _row_tile(pointer, row, offsets, D: tl.constexpr):
    """Elements `offsets` of a row of `[R, D]` in float32, zero beyond the end."""
    return tl.load(pointer + row * D + offsets, mask=offsets < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["start", "n"])
def mix_forward(
    sources,  # of this group, [R, D] each
    logits,  # [R, m] float32
    query,  # [D] or None
    carry,  # [R, D] float32: the sum over the earlier groups; None where there is one group
    mixture,  # [R, D], written by the last group
    weights,  # [R, n] float32, written by the last group
    start,  # index of the group's first source
    n,
    eps,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two, at least n
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    SCORED: tl.constexpr = LAST and query is not None
    row = tl.program_id(0).to(tl.int64)
    m = n if query is None else n - 1
    columns = tl.arange(0, WIDTH)
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    logit = tl.load(logits + row * m + columns, mask=columns < m, other=float("-inf"))
    if SCORED:
        dot = tl.zeros((LANES,), tl.float32)
        square = tl.zeros((LANES,), tl.float32)
        for position in range(0, D, LANES * VECTOR):
            value = _row_tile(sources[len(sources) - 1], row, position + tile, D)
            dot += tl.sum(value * _row_tile(query, 0, position + tile, D), axis=1)
            square += tl.sum(value * value, axis=1)
        scored = tl.sum(dot, axis=0) * tl.rsqrt(tl.sum(square, axis=0) / D + eps)
        logit = tl.where(columns == m, scored, logit)
    top = tl.max(logit, axis=0)
    exponential = tl.exp(logit - top)
    total = tl.sum(exponential, axis=0)
    if LAST:
        tl.store(weights + row * n + columns, exponential / total, mask=columns < n)

    # Every thread computes the weights of the group as scalars: cheaper than taking them out of the row of weights.
    group_weights = ()
    for i in tl.static_range(len(sources)):
        if SCORED and i == len(sources) - 1:
            group_weights = group_weights + (tl.exp(scored - top) / total,)
        else:
            group_weights = group_weights + (tl.exp(tl.load(logits + row * m + start + i) - top) / total,)
    if not FIRST and SCORED:  # what is carried was weighted as if there were only the first m sources
        share = tl.sum(tl.where(columns < m, exponential, 0.0), axis=0) / total

    for position in range(0, D, LANES * VECTOR):
        offsets = position + tile
        if FIRST:
            mixed = tl.zeros((LANES, VECTOR), tl.float32)
        else:
            mixed = _row_tile(carry, row, offsets, D)
            if SCORED:
                mixed *= share
        for i in tl.static_range(len(sources)):
            mixed += group_weights[i] * _row_tile(sources[i], row, offsets, D)
        if LAST:
            tl.store(mixture + row * D + offsets, mixed.to(mixture.dtype.element_ty), mask=offsets < D)
        else:
            tl.store(carry + row * D + offsets, mixed, mask=offsets < D)


@triton.jit(do_not_specialize=["start", "n"])
def mix_backward(
    sources,  # of this group, [R, D] each
    gradients,  # of these sources, [R, D] each; None for a source that needs none
    weights,  # [R, n] float32
    query,  # [D] or None
    mixture_gradient,  # [R, D]
    weights_gradient,  # [R, n] float32 or None
    logits_gradient,  # [R, m] float32, written by the last group; until then dot products of the earlier sources
    query_slope,  # [R] float32: the query's gradient is the sum of these times the last source; None without a query
    start,
    n,
    eps,
    LAST: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    SCORED: tl.constexpr = LAST and query is not None
    COUNT: tl.constexpr = len(sources)
    row = tl.program_id(0).to(tl.int64)
    m = n if query is None else n - 1
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    group_weights = ()
    dots = ()  # mixture_gradient . v_i, the gradient of weight i
    for i in tl.static_range(COUNT):
        group_weights = group_weights + (tl.load(weights + row * n + start + i),)
        dots = dots + (tl.zeros((LANES,), tl.float32),)
    query_dot = tl.zeros((LANES,), tl.float32)
    square = tl.zeros((LANES,), tl.float32)

    for position in range(0, D, LANES * VECTOR):
        offsets = position + tile
        gradient = _row_tile(mixture_gradient, row, offsets, D)
        new_dots = ()
        for i in tl.static_range(COUNT):
            value = _row_tile(sources[i], row, offsets, D)
            new_dots = new_dots + (dots[i] + tl.sum(gradient * value, axis=1),)
            if SCORED and i == COUNT - 1:  # its gradient goes through its logit too, which takes all dot products
                query_dot += tl.sum(value * _row_tile(query, 0, offsets, D), axis=1)
                square += tl.sum(value * value, axis=1)
            elif gradients[i] is not None:
                weighted = group_weights[i] * gradient
                pointers = gradients[i] + row * D + offsets
                tl.store(pointers, weighted.to(gradients[i].dtype.element_ty), mask=offsets < D)
        dots = new_dots

    if not LAST:
        for i in tl.static_range(COUNT):
            tl.store(logits_gradient + row * m + start + i, tl.sum(dots[i], axis=0))
    else:
        columns = tl.arange(0, WIDTH)
        change = tl.load(logits_gradient + row * m + columns, mask=columns < start, other=0.0)
        for i in tl.static_range(COUNT):
            change = tl.where(columns == start + i, tl.sum(dots[i], axis=0), change)
        if weights_gradient is not None:
            change += tl.load(weights_gradient + row * n + columns, mask=columns < n, other=0.0)
        weight = tl.load(weights + row * n + columns, mask=columns < n, other=0.0)
        change = weight * (change - tl.sum(weight * change, axis=0))
        tl.store(logits_gradient + row * m + columns, change, mask=columns < m)

        if SCORED:
            inverse_rms = tl.rsqrt(tl.sum(square, axis=0) / D + eps)
            scored = tl.sum(query_dot, axis=0) * inverse_rms
            slope = tl.sum(tl.where(columns == m, change, 0.0), axis=0) * inverse_rms
            tl.store(query_slope + row, slope)
            if gradients[COUNT - 1] is not None:
                pull = scored * inverse_rms / D
                for position in range(0, D, LANES * VECTOR):
                    offsets = position + tile
                    value = _row_tile(sources[COUNT - 1], row, offsets, D)
                    weighted = group_weights[COUNT - 1] * _row_tile(mixture_gradient, row, offsets, D)
                    weighted += slope * (_row_tile(query, 0, offsets, D) - pull * value)
                    pointers = gradients[COUNT - 1] + row * D + offsets
                    tl.store(pointers, weighted.to(gradients[COUNT - 1].dtype.element_ty), mask=offsets < D)


@triton.jit(do_not_specialize=["num_rows"])
def query_backward(
    source,  # [R, D]
    query_slope,  # [R] float32
    partial_gradients,  # [programs, D] float32, one row per run of ROWS rows: summed afterwards, in a fixed order
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    total = tl.zeros((TILE_COLUMNS,), tl.float32)
    for first in range(0, ROWS, TILE_ROWS):
        rows = run * ROWS + first + tl.arange(0, TILE_ROWS)
        slope = tl.load(query_slope + rows, mask=rows < num_rows, other=0.0)
        inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
        value = tl.load(source + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(slope[:, None] * value.to(tl.float32), axis=0)
    tl.store(partial_gradients + run * D + columns, total, mask=columns < D)
