"""The mixing over depth in one pass over the sources: softmax over their logits, weighted sum, both in float32.

    w = softmax(logits),    mixture = sum_i w_i v_i

Registered with PyTorch as the operators `attnres::mix` and `attnres::mix_backward`, so that torch.compile, torch.export
and activation checkpointing (`torch.ops.attnres.mix.default` in a selective policy) see one operation. Saved for the
backward pass: the sources by reference, and the weights. Nothing is added atomically: results repeat bit by bit.

Shapes: B batch, T tokens, R = B * T rows, D hidden size, n sources, m logits given (n, or n - 1 with a query).
"""

import functools

import torch
import triton

from .mix_kernels import mix_backward, mix_forward, query_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # "cuda" is AMD's name too
INTERPRETED = not isinstance(mix_forward, triton.JITFunction)  # TRITON_INTERPRET=1: runs on any device, slowly

# A kernel is compiled per number of sources in a launch; more than these take several launches.
GROUP_SIZE = 16
MAX_LANES = 128
QUERY_TILE = (16, 128)  # rows, columns

# The numbers a Triton release contracts to fused multiply-adds by default differ; say it.
OPTIONS = {"enable_fp_fusion": True}


def is_supported(sources: list[torch.Tensor]) -> bool:
    """Whether `mix_triton` takes these sources: a device and a floating dtype it has kernels for."""
    return sources[0].dtype in DTYPES and (INTERPRETED or sources[0].device.type in DEVICES)


def mix_triton(
    sources: list[torch.Tensor], logits: torch.Tensor, query: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the logits of the sources and the weighted sum of the sources.

    Args:
        sources: n tensors `[B, T, D]` of one dtype.
        logits: `[B, T, m]` float32: of all sources, or with a query of all but the last.
        query: gain-weighted pseudo-query `[D]`, by which the last source is scored here: (query . v) / rms(v).
        eps: epsilon of that root mean square.

    Returns:
        The mixture `[B, T, D]` in the dtype of the sources, rounded once, and the depth weights `[B, T, n]`, float32.
    """
    _check(sources, logits, query)
    return torch.ops.attnres.mix(sources, logits, query, eps)


def _check(sources, logits, query):
    first = sources[0]
    if not is_supported(sources):
        raise ValueError(
            f"sources must be {', '.join(str(dtype) for dtype in DTYPES)} on {' or '.join(DEVICES)}, got {first.dtype} "
            f'on {first.device.type}. Use depth_implementation="eager" there.'
        )
    for source in sources:
        if source.shape != first.shape or source.dtype != first.dtype or source.device != first.device:
            raise ValueError(
                f"sources must have one shape, dtype and device, got {tuple(first.shape)} {first.dtype} {first.device} "
                f"and {tuple(source.shape)} {source.dtype} {source.device}."
            )
    expected = (*first.shape[:-1], len(sources) - (query is not None))
    if tuple(logits.shape) != expected or logits.dtype != torch.float32:
        raise ValueError(
            f"logits must be {expected} torch.float32, those of {len(sources)} sources"
            f"{'' if query is None else ' but the last, which the query scores'}; "
            f"got {tuple(logits.shape)} {logits.dtype}."
        )
    if query is not None and query.shape != first.shape[-1:]:
        raise ValueError(f"query must be {tuple(first.shape[-1:])}, got {tuple(query.shape)}.")


@torch.library.custom_op("attnres::mix", mutates_args=())
def _mix(
    sources: list[torch.Tensor], logits: torch.Tensor, query: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, n = sources[0].shape, len(sources)
    mixture = sources[0].new_empty(shape)
    weights = logits.new_empty((*shape[:-1], n))
    sources, logits, query = _contiguous(sources), logits.contiguous(), None if query is None else query.contiguous()
    carry = mixture.new_empty(shape, dtype=torch.float32) if n > GROUP_SIZE else None
    rows, tiling = _tiling(mixture, n)
    with _on(mixture.device):
        for start in range(0, n, GROUP_SIZE):
            group = tuple(sources[start : start + GROUP_SIZE])
            first_last = {"FIRST": start == 0, "LAST": start + GROUP_SIZE >= n}
            mix_forward[(rows,)](
                group, logits, query, carry, mixture, weights, start, n, eps, **first_last, **tiling, **OPTIONS
            )
    return mixture, weights


@_mix.register_fake
def _(sources, logits, query, eps):
    shape = sources[0].shape
    return sources[0].new_empty(shape), logits.new_empty((*shape[:-1], len(sources)))


@torch.library.custom_op("attnres::mix_backward", mutates_args=())
def _mix_backward(
    mixture_gradient: torch.Tensor,
    weights_gradient: torch.Tensor | None,
    sources: list[torch.Tensor],
    weights: torch.Tensor,
    query: torch.Tensor | None,
    eps: float,
    source_needs: list[bool],
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients of the sources that need one, of the logits, and of the query (empty without one)."""
    shape, n, size = sources[0].shape, len(sources), sources[0].shape[-1]
    gradients = [
        source.new_empty(shape) if needs else None for source, needs in zip(sources, source_needs, strict=True)
    ]
    logits_gradient = weights.new_empty((*shape[:-1], n - (query is not None)))
    query_gradient = weights.new_empty(0)
    returned = [gradient for gradient in gradients if gradient is not None]
    sources, mixture_gradient = _contiguous(sources), mixture_gradient.contiguous()
    weights_gradient = None if weights_gradient is None else weights_gradient.contiguous()
    query = None if query is None else query.contiguous()
    rows, tiling = _tiling(sources[0], n)
    slope = None if query is None else weights.new_empty(rows)
    with _on(weights.device):
        for start in range(0, n, GROUP_SIZE):
            mix_backward[(rows,)](
                tuple(sources[start : start + GROUP_SIZE]),
                tuple(gradients[start : start + GROUP_SIZE]),
                weights,
                query,
                mixture_gradient,
                weights_gradient,
                logits_gradient,
                slope,
                start,
                n,
                eps,
                LAST=start + GROUP_SIZE >= n,
                **tiling,
                **OPTIONS,
            )
        if query is not None:
            tile_rows, tile_columns = QUERY_TILE
            run = max(64, triton.next_power_of_2(triton.cdiv(rows, 256)))
            parts = weights.new_empty((triton.cdiv(rows, run), size))
            query_backward[(parts.shape[0], triton.cdiv(size, tile_columns))](
                sources[-1],
                slope,
                parts,
                rows,
                D=size,
                ROWS=run,
                TILE_ROWS=tile_rows,
                TILE_COLUMNS=tile_columns,
                **OPTIONS,
            )
            query_gradient = parts.sum(0).to(query.dtype)
    return returned, logits_gradient, query_gradient


@_mix_backward.register_fake
def _(mixture_gradient, weights_gradient, sources, weights, query, eps, source_needs):
    shape = sources[0].shape
    returned = [source.new_empty(shape) for source, needs in zip(sources, source_needs, strict=True) if needs]
    logits_gradient = weights.new_empty((*shape[:-1], len(sources) - (query is not None)))
    return returned, logits_gradient, weights.new_empty(0) if query is None else torch.empty_like(query)


def _save(ctx, inputs, output):
    sources, _, query, ctx.eps = inputs
    ctx.has_query = query is not None
    ctx.save_for_backward(*sources, output[1], *([query] if ctx.has_query else []))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, mixture_gradient, weights_gradient):
    saved = list(ctx.saved_tensors)
    query = saved.pop() if ctx.has_query else None
    *sources, weights = saved
    if mixture_gradient is None:
        mixture_gradient = torch.zeros_like(sources[0])
    needs = ctx.needs_input_grad[0]
    gradients, logits_gradient, query_gradient = torch.ops.attnres.mix_backward(
        mixture_gradient, weights_gradient, sources, weights, query, ctx.eps, needs
    )
    gradients = iter(gradients)
    return (
        [next(gradients) if need else None for need in needs],
        logits_gradient,
        query_gradient if ctx.has_query else None,
        None,
    )


_mix.register_autograd(_differentiate, setup_context=_save)


def _contiguous(sources):
    return [source.contiguous() for source in sources]


def _tiling(source, n):
    size = source.shape[-1]
    vector = 16 // source.element_size()  # one load of a thread
    lanes = min(MAX_LANES, triton.next_power_of_2(triton.cdiv(size, vector)))
    tiling = {"D": size, "WIDTH": triton.next_power_of_2(n), "LANES": lanes, "VECTOR": vector}
    return source.numel() // size, {**tiling, "num_warps": max(1, lanes // 32)}


def _on(device):
    """Kernels run on the current device, which is not always that of the tensors."""
    return torch.accelerator.device_index(device.index)


@torch.compiler.assume_constant_result  # inside torch.compile it runs while tracing
def self_check(device: torch.device) -> str | None:
    """Mixes small random sources on the device and compares with the formula, once per device.

    Returns:
        None where results and gradients agree, otherwise one line saying what went wrong.
    """
    return _verdict(device)


@functools.cache
def _verdict(device):
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller computes without gradients
            for dtype, with_query in ((torch.float32, True), (torch.bfloat16, False)):
                problem = _compare(torch.device(device), dtype, with_query)
                if problem is not None:
                    return problem
    except Exception as error:  # whatever a driver or a compiler raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _compare(device, dtype, with_query):
    generator = torch.Generator("cpu").manual_seed(0)
    n, shape, eps = 3, (1, 3, 1031), 1e-5

    def random(*size):
        return torch.randn(*size, generator=generator, device="cpu", dtype=torch.float64)

    logits, query = random(*shape[:-1], n - with_query), random(shape[-1]) / 8
    inputs = [*random(n, *shape).to(dtype), logits.float(), *([query.float()] if with_query else [])]
    exact = [tensor.double().requires_grad_() for tensor in inputs]  # on the CPU: not every device has float64
    inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
    outputs = mix_triton(inputs[:n], inputs[n], inputs[n + 1] if with_query else None, eps)
    logits = exact[n]
    if with_query:
        scored = (exact[n - 1] * exact[n + 1]).sum(-1) * torch.rsqrt(exact[n - 1].square().mean(-1) + eps)
        logits = torch.cat([logits, scored.unsqueeze(-1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    expected = (sum(w.unsqueeze(-1) * v for w, v in zip(weights.unbind(-1), exact[:n], strict=True)), weights)
    sides = [random(*output.shape) for output in expected]
    found = (
        *outputs,
        *torch.autograd.grad(outputs, inputs, [s.to(o) for s, o in zip(sides, outputs, strict=True)]),
    )
    expected = (*expected, *torch.autograd.grad(expected, exact, sides))
    names = [
        "mixture",
        "weights",
        *(f"gradient of source {i}" for i in range(n)),
        "gradient of logits",
        "gradient of query",
    ]
    for name, value, truth in zip(names, found, expected, strict=False):
        error = ((value.cpu().double() - truth).abs().max() / truth.abs().max()).item()
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        if not error < tolerance:
            return f"{name} in {dtype} is off by {error:.1e} of its largest value (tolerance {tolerance})"
    return None
