"""The CPU back end of `attnres::mix`: calls kernels that numba compiles.

All arithmetic is float32. With the same number of threads, results repeat bit by bit, and the results of a token do not
depend on the other tokens.

Shapes: B batch, T tokens, D hidden size, n sources.
"""

import ctypes
import functools
import importlib
from struct import Struct

import torch

from .self_check import compare

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _kernels(dtype: torch.dtype):
    """Returns the module `cpu_kernels`, which needs numba, and its forward and backward kernels."""
    module = importlib.import_module("attnres.kernels.cpu_kernels")
    return module, *module.kernels(dtype)


@functools.cache
def _struct(addresses: int) -> Struct:
    return Struct(f"={_kernels(torch.float32)[0].LAYOUT}{addresses}q")


def _in_memory(*tensors: torch.Tensor) -> tuple[list[torch.Tensor] | tuple[torch.Tensor, ...], list[int]]:
    """Returns the tensors with their elements in order in memory, copied if need be, and their addresses.

    The memory of a negative view holds other numbers, and a zero tensor (address 0) has no memory.
    """
    plain, negative = torch.Tensor.is_contiguous, torch.Tensor.is_neg
    addresses = [tensor.data_ptr() for tensor in tensors]
    if not all(map(plain, tensors)) or any(map(negative, tensors)) or 0 in addresses:
        tensors = [torch.empty(each.shape, dtype=each.dtype, device="cpu").copy_(each) for each in tensors]
        addresses = [tensor.data_ptr() for tensor in tensors]
    return tensors, addresses


def _run(module, kernel, parts: int, fields: tuple, addresses: list[int]):
    # The kernel counts its parts in this buffer, so no two calls can share one.
    table = ctypes.create_string_buffer(_struct(len(addresses)).pack(0, parts, *fields, *addresses))
    module.run(kernel, ctypes.addressof(table), parts)


def forward(sources, query, eps, norm_weight, norm_offset, norm_eps, scale, keep_weights=True):
    """Computes `attnres::mix`, whose arguments `operator` describes.

    Returns:
        The output `[B, T, D]` in the dtype of the sources, rounded once, and the depth weights `[B, T, n]`, float32, or
        `None` without `keep_weights`.
    """
    first, count = sources[0], len(sources)
    shape, numbers = first.shape, first.numel()
    module, kernel, _ = _kernels(first.dtype)
    kept, addresses = _in_memory(query if norm_weight is None else norm_weight, query, *sources)
    # torch.empty would use the default device, and takes longer.
    output = torch.empty_like(kept[2])
    weights = kept[1].new_empty((*shape[:-1], count)) if keep_weights else None
    if not numbers:
        return output, weights
    size = shape[-1]
    tokens = numbers // size
    of_gain, of_query, *of_sources = addresses
    fields = (count, size, tokens, of_query, 0 if norm_weight is None else of_gain)
    fields += (output.data_ptr(), weights.data_ptr() if keep_weights else 0, 0, 0, 0)
    fields += (eps, norm_offset, norm_eps, scale)
    _run(module, kernel, module.parts((count + 1) * numbers, tokens), fields, of_sources + [0] * count)
    return output, weights


def backward(grad_output, grad_weights, sources, query, eps, weights, norm_weight, norm_offset, norm_eps, scale, needs):
    """Computes `attnres::mix_backward`, whose arguments `operator` describes.

    Returns:
        The gradients of the sources (empty where `needs` is False), of the query, and of the norm weight or `None`.
    """
    first, count = sources[0], len(sources)
    size, numbers, dtype = first.shape[-1], first.numel(), first.dtype
    module, _, kernel = _kernels(dtype)
    gain = query if norm_weight is None else norm_weight
    (query, weights, gain, *sources), addresses = _in_memory(query, weights, gain, *sources)
    gradients = [sources[0].new_empty(first.shape if need else 0) for need in needs]
    given = torch.zeros_like(sources[0]) if grad_output is None else _in_memory(grad_output.to(dtype))[0][0]
    changes = None if grad_weights is None else _in_memory(grad_weights.to(torch.float32))[0][0]
    tokens = numbers // max(size, 1)
    parts = module.parts((2 * count + 1) * numbers, tokens)
    sums = query.new_zeros(1 if norm_weight is None else 2, parts, size)
    if numbers:
        of_query, of_weights, of_gain, *of_sources = addresses
        fields = (count, size, tokens, of_query, 0 if norm_weight is None else of_gain, given.data_ptr(), of_weights)
        fields += (0 if changes is None else changes.data_ptr(), sums[0].data_ptr(), sums[-1].data_ptr())
        fields += (eps, norm_offset, norm_eps, scale)
        of_gradients = [gradient.data_ptr() if need else 0 for gradient, need in zip(gradients, needs, strict=True)]
        _run(module, kernel, parts, fields, of_sources + of_gradients)
    by_query, *by_gain = (part.sum(0) for part in sums)  # separate, as results of an operator must not share memory
    return gradients, by_query, by_gain[0] if by_gain else None


@functools.cache
def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the kernels cannot be used, in one line, or `None` if they can.

    The first call runs them on small random sources and compares results and gradients with the equation.
    """
    if device.type != "cpu":
        return f"these kernels run on CPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"the CPU kernels take {', '.join(map(str, DTYPES))}, not {dtype}"
    try:
        return compare(forward, backward, device, dtype)
    except ImportError as error:
        reason = " ".join(str(error).split())
        return f"mixing on the CPU is slower than it could be ({reason}); pip install 'attention-residuals[cpu]'"
    except Exception as error:  # compilers raise errors of many types
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
