"""Scores, mixes and norms the sources in one pass over them, with kernels that numba compiles for CPUs.

All arithmetic is float32. For a number of threads, results repeat bit by bit, and those of a token do not depend on the
others.

Shapes: B batch, T tokens, D hidden size, n sources, P parts of the tokens.
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
    """The module, imported only now as not everyone has numba, and its two kernels."""
    module = importlib.import_module("attnres.kernels.cpu_kernels")
    return module, *module.kernels(dtype)


@functools.cache
def _struct(addresses: int) -> Struct:
    return Struct(f"={_kernels(torch.float32)[0].LAYOUT}{addresses}q")


def _in_memory(*tensors: torch.Tensor) -> tuple[list[torch.Tensor] | tuple[torch.Tensor, ...], list[int]]:
    """The tensors, copied if their numbers do not lie one after the other, and their addresses: all that kernels see.

    The memory of a negative view holds other numbers, and a zero tensor (address 0) has none.
    """
    plain, negative = torch.Tensor.is_contiguous, torch.Tensor.is_neg
    addresses = [tensor.data_ptr() for tensor in tensors]
    if not all(map(plain, tensors)) or any(map(negative, tensors)) or 0 in addresses:
        tensors = [torch.empty(each.shape, dtype=each.dtype, device="cpu").copy_(each) for each in tensors]
        addresses = [tensor.data_ptr() for tensor in tensors]
    return tensors, addresses


def _run(module, kernel, parts: int, fields: tuple, addresses: list[int]):
    # A string of bytes that the kernel counts its parts in: never shared between calls.
    table = ctypes.create_string_buffer(_struct(len(addresses)).pack(0, parts, *fields, *addresses))
    module.run(kernel, ctypes.addressof(table), parts)


def forward(
    sources: list[torch.Tensor],
    query: torch.Tensor,
    eps: float,
    norm_weight: torch.Tensor | None,
    norm_offset: float,
    norm_eps: float,
    scale: float,
    keep_weights: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output `[B, T, D]` in the dtype of the sources, rounded once, and depth weights `[B, T, n]`, float32, or `None`
    where they are not kept.

    `query` is float32 and holds the gain of the key norm; the norm multiplies by `norm_weight + norm_offset`.
    """
    first, count = sources[0], len(sources)
    shape, numbers = first.shape, first.numel()
    module, kernel, _ = _kernels(first.dtype)
    kept, addresses = _in_memory(query if norm_weight is None else norm_weight, query, *sources)
    # Like something that is there: torch.empty would follow the default device, and takes longer.
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
        fields = (
            count,
            size,
            tokens,
            query.data_ptr(),
            0 if norm_weight is None else gain.data_ptr(),
            given.data_ptr(),
        )
        fields += (weights.data_ptr(), 0 if changes is None else changes.data_ptr())
        fields += (sums[0].data_ptr(), sums[-1].data_ptr(), eps, norm_offset, norm_eps, scale)
        addresses = addresses[3:]
        addresses += [gradient.data_ptr() if need else 0 for gradient, need in zip(gradients, needs, strict=True)]
        _run(module, kernel, parts, fields, addresses)
    of_query, *of_gain = (parts.sum(0) for parts in sums)  # apart: results of an operator must not share memory
    return gradients, of_query, of_gain[0] if of_gain else None


@functools.cache
def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot be used there, in one line, or None.

    The first call runs them on small random sources and compares results and gradients with the formula.
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
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
