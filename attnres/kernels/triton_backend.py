"""The GPU back end of `attnres::mix`: launches Triton kernels.

All arithmetic is float32. There are no atomic additions, so results repeat bit by bit.

Shapes: B batch, T tokens, R = B * T rows, D hidden size, n sources.
"""

import functools

import torch
import triton

from .self_check import compare
from .triton_kernels import add_sources, mix_backward, mix_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # AMD GPUs are called "cuda" as well
INTERPRETED = not isinstance(mix_forward, triton.JITFunction)  # TRITON_INTERPRET=1: runs on any device, slowly

GROUP_SIZE = 16  # sources per launch; a kernel is compiled for each number of sources in a launch
MAX_SIZE = 16384  # elements of a row, which a program holds in registers

# Warps of the backward pass that a large GPU holds at once. It is a constant so that the partial sums of the gradients
# of the query and the norm weight, and with them the results, do not depend on the GPU.
RESIDENT_WARPS = 2048


def forward(sources, query, eps, norm_weight, norm_offset, norm_eps, scale):
    """Computes `attnres::mix`, whose arguments `operator` describes.

    Returns:
        The output `[B, T, D]` in the dtype of the sources, rounded once, and the depth weights `[B, T, n]`, float32.
    """
    sources, query, norm_weight = _contiguous(sources), query.contiguous(), _contiguous(norm_weight)
    n, shape = len(sources), sources[0].shape
    rows, layout = _layout(sources[0])
    output = torch.empty_like(sources[0])
    weights = query.new_empty((*shape[:-1], n))
    carry = query.new_empty(shape) if n > GROUP_SIZE else None
    with torch.accelerator.device_index(query.device.index):  # where Triton launches kernels
        for start in range(0, n, GROUP_SIZE):
            group = tuple(sources[start : start + GROUP_SIZE])
            ends = {"FIRST": start == 0, "LAST": start + GROUP_SIZE >= n}
            tensors = (group, query, norm_weight, output, weights, carry)
            numbers = (start, n, eps, norm_offset, norm_eps, scale)
            mix_forward[(rows,)](*tensors, *numbers, **ends, WIDTH=triton.next_power_of_2(n), **layout)
    return output, weights


def backward(grad_output, grad_weights, sources, query, eps, weights, norm_weight, norm_offset, norm_eps, scale, needs):
    """Computes `attnres::mix_backward`, whose arguments `operator` describes.

    Returns:
        The gradients of the sources (empty where `needs` is False), of the query, and of the norm weight or `None`.
    """
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
    """Returns the number of rows and the kernels' options for rows of this size."""
    size = source.shape[-1]
    if size > MAX_SIZE:
        raise ValueError(f"hidden_size for the Triton kernels must be at most {MAX_SIZE}, got {size}.")
    block = triton.next_power_of_2(size)
    # 8 elements per thread: a thread reads its part of a half-precision row in one load, and the five rows of the
    # backward pass fit the registers. AMD has at most 16 warps; registers spill beyond 4096 elements. The default of
    # enable_fp_fusion differs between Triton releases.
    options = {"num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}
    return source.numel() // size, {"D": size, "BLOCK": block, **options}


@functools.cache
def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the kernels cannot be used, in one line, or `None` if they can.

    The first call runs them on small random sources and compares results and gradients with the equation.
    """
    if dtype not in DTYPES:
        return f"the Triton kernels take {', '.join(map(str, DTYPES))}, not {dtype}"
    if not INTERPRETED and device.type not in DEVICES:
        return f"the Triton kernels run on {' or '.join(DEVICES)}, not on {device.type}"
    try:
        return compare(forward, backward, device, dtype)
    except Exception as error:  # drivers and compilers raise errors of many types
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
