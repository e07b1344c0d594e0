"""Scores, mixes and norms the sources in one pass over them, with Triton kernels.

    logit_i = query . v_i / rms(v_i),    w = softmax(logit),    h = scale sum_i w_i v_i,    output = norm(h)

All arithmetic is float32. Nothing is added atomically: results repeat bit by bit.

Shapes: B batch, T tokens, R = B * T rows, D hidden size, n sources.
"""

import functools

import torch
import triton

from .triton_kernels import add_sources, mix_backward, mix_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # "cuda" is AMD's name too
INTERPRETED = not isinstance(mix_forward, triton.JITFunction)  # TRITON_INTERPRET=1: runs on any device, slowly

GROUP_SIZE = 16  # A kernel is compiled per number of sources in a launch; more than these take several launches.
MAX_SIZE = 16384  # of a row, which a program holds in registers

# Warps of the backward pass that a large GPU holds at once. A constant: the partial sums of the gradients of query and
# norm weight, and with them the results, do not depend on the GPU.
RESIDENT_WARPS = 2048


def forward(
    sources: list[torch.Tensor],
    query: torch.Tensor,
    eps: float,
    norm_weight: torch.Tensor | None,
    norm_offset: float,
    norm_eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, T, D]`, rounded once to the dtype of the sources, and depth weights `[B, T, n]`, float32.

    `query` is float32 and holds the gain of the key norm; the norm multiplies by `norm_weight + norm_offset`.
    """
    sources, query, norm_weight = _contiguous(sources), query.contiguous(), _contiguous(norm_weight)
    n, shape = len(sources), sources[0].shape
    rows, layout = _layout(sources[0])
    output = torch.empty_like(sources[0])
    weights = query.new_empty((*shape[:-1], n))
    carry = query.new_empty(shape) if n > GROUP_SIZE else None
    with torch.accelerator.device_index(query.device.index):  # where Triton launches
        for start in range(0, n, GROUP_SIZE):
            group = tuple(sources[start : start + GROUP_SIZE])
            ends = {"FIRST": start == 0, "LAST": start + GROUP_SIZE >= n}
            tensors = (group, query, norm_weight, output, weights, carry)
            numbers = (start, n, eps, norm_offset, norm_eps, scale)
            mix_forward[(rows,)](*tensors, *numbers, **ends, WIDTH=triton.next_power_of_2(n), **layout)
    return output, weights


def backward(
    grad_output: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    sources: list[torch.Tensor],
    query: torch.Tensor,
    eps: float,
    weights: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_offset: float,
    norm_eps: float,
    scale: float,
    needs: list[bool],
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Gradients of the sources (empty where `needs` is False), of the query, and of the norm weight if there is one."""
    grad_output = torch.zeros_like(sources[0]) if grad_output is None else grad_output
    sources, query, norm_weight = _contiguous(sources), query.contiguous(), _contiguous(norm_weight)
    grad_output, grad_weights, weights = grad_output.contiguous(), _contiguous(grad_weights), weights.contiguous()
    n, shape = len(sources), sources[0].shape
    rows, layout = _layout(sources[0])
    gradients = [torch.empty_like(source) if need else None for source, need in zip(sources, needs, strict=True)]
    programs = min(rows, RESIDENT_WARPS // layout["num_warps"])
    starts = range(0, n, GROUP_SIZE)
    query_parts = query.new_empty((len(starts), programs, shape[-1]))
    norm_parts = None if norm_weight is None else query.new_empty(query_parts.shape[1:])
    mixture = query.new_empty(shape) if n > GROUP_SIZE else None
    with torch.accelerator.device_index(query.device.index):
        if mixture is not None:
            for start in starts:
                group = tuple(sources[start : start + GROUP_SIZE])
                add_sources[(rows,)](group, weights, mixture, start, n, scale, FIRST=start == 0, **layout)
        for index, start in enumerate(starts):
            groups = (tuple(tensors[start : start + GROUP_SIZE]) for tensors in (sources, gradients))
            tensors = (query, norm_weight, weights, mixture, grad_output, grad_weights)
            parts = (query_parts[index], norm_parts)
            numbers = (start, n, rows, eps, norm_offset, norm_eps, scale)
            width = triton.next_power_of_2(n)
            mix_backward[(programs,)](*groups, *tensors, *parts, *numbers, WIDTH=width, **layout)
        grad_query = query_parts.sum((0, 1))
        grad_norm_weight = None if norm_parts is None else norm_parts.sum(0)
    empty = sources[0].new_empty
    return [empty(0) if gradient is None else gradient for gradient in gradients], grad_query, grad_norm_weight


def _contiguous(tensors):
    if isinstance(tensors, (list, tuple)):
        return [tensor.contiguous() for tensor in tensors]
    return None if tensors is None else tensors.contiguous()


def _layout(source):
    """The number of rows, and how one of them lies in the registers of a program."""
    size = source.shape[-1]
    if size > MAX_SIZE:
        raise ValueError(f"the Triton kernels take a hidden size of at most {MAX_SIZE}, got {size}.")
    block = triton.next_power_of_2(size)
    # 8 elements a thread: one load of a half-precision row, and the five rows of the backward pass fit the registers.
    # AMD has no more than 16 warps; beyond 4096 elements registers spill. The numbers a Triton release contracts to
    # fused multiply-adds by default differ; say it.
    options = {"num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}
    return source.numel() // size, {"D": size, "BLOCK": block, **options}


@functools.cache
def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot be used there, in one line, or None.

    The first call runs them on small random sources and compares results and gradients with the formula.
    """
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(map(str, DTYPES))}, not {dtype}"
    if not INTERPRETED and device.type not in DEVICES:
        return f"the Triton kernels run on {' or '.join(DEVICES)}, not on {device.type}"
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller computes without gradients
            return _compare(device, dtype)
    except Exception as error:  # whatever a driver or a compiler raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compare(device, dtype):
    generator = torch.Generator("cpu").manual_seed(0)
    n, size, rows, eps, offset, norm_eps, scale = 3, 1031, (1, 3), 1e-5, 1.0, 1e-6, 2.0

    def random(*shape):
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float64)

    sources, query, gain = random(n, *rows, size).to(dtype), random(size).float() / 8, random(size).to(dtype)
    sides = random(*rows, size).to(dtype), random(*rows, n).float()

    *exact, q, g = (tensor.double().requires_grad_() for tensor in (*sources, query, gain))
    logits = [(q * v).sum(-1) * torch.rsqrt(v.square().mean(-1) + eps) for v in exact]
    weights = torch.softmax(torch.stack(logits, dim=-1), dim=-1)
    mixture = scale * sum(w.unsqueeze(-1) * v for w, v in zip(weights.unbind(-1), exact, strict=True))
    output = (g + offset) * mixture * torch.rsqrt(mixture.square().mean(-1, keepdim=True) + norm_eps)
    of_gradients = torch.autograd.grad((output, weights), (*exact, q, g), [side.double() for side in sides])

    sources, query, gain = [source.to(device) for source in sources], query.to(device), gain.to(device)
    norm = gain, offset, norm_eps, scale
    found = forward(sources, query, eps, *norm)
    sides = [side.to(device) for side in sides]
    of_sources, of_query, of_gain = backward(*sides, sources, query, eps, found[1], *norm, [True] * n)
    names = ["output", "weights", *(f"gradient of source {i}" for i in range(n))]
    names += ["gradient of the query", "gradient of the norm weight"]
    found, expected = (*found, *of_sources, of_query, of_gain), (output, weights, *of_gradients)
    for name, value, truth in zip(names, found, expected, strict=True):
        error = ((value.cpu().double() - truth).abs().max() / truth.abs().max()).item()
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        if not error < tolerance:
            return f"{name} in {dtype} is off by {error:.1e} of its largest value (tolerance {tolerance})"
    return None
