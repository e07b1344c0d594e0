"""Chooses the implementation of the mixing: the equation in `depth_mixer`, or the package's fused `attnres::mix`.

The operator is called by name, because these files also travel to the Hub as remote code, where the package may be
missing or have another version. Shapes: B batch, T tokens, D hidden size, n sources.
"""

import importlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from .torch_internals import in_dispatch_mode, in_function_transform, is_fake

# The version of the operator's arguments and results. It is raised with every change of these, so that the files of a
# saved folder never call an operator with another meaning.
KERNEL_ABI = 3

DEPTH_IMPLEMENTATIONS = ("auto", "eager", "triton")


class Norm(NamedTuple):
    """An RMSNorm as numbers."""

    weight: torch.Tensor  # the gain, [D]
    offset: float  # is added to the gain: 1 in Gemma
    eps: float


def fused_backend(implementation: str, source: torch.Tensor) -> str | None:
    """Returns the back end of `attnres::mix` for sources like this one, "cpu" or "triton", or `None` for the equation.

    "auto" uses the operator wherever it runs, except under compilers on CPUs, which fuse the equation themselves.
    "triton" warns once where it cannot run.
    """
    if implementation == "eager":
        return None
    device = source.device
    if torch.compiler.is_compiling():
        if device.type == "cpu" and implementation == "auto":
            return None
    else:
        if in_function_transform():
            return None
        if implementation == "triton" and is_fake(source) and _abi_problem() is None:
            return "triton"  # planning needs no device
    return _backend(implementation, device.type, device.index, source.dtype)


@torch.compiler.assume_constant_result  # compilers would trace into a cached function
def _backend(implementation: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    return _find_backend(implementation, device_type, device_index, dtype)


@lru_cache
def _find_backend(implementation: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    backend = "cpu" if implementation == "auto" and device_type == "cpu" else "triton"
    if implementation == "auto" and device_type not in ("cpu", "cuda"):
        return None
    if dtype == torch.float64:
        return None  # the kernels compute in float32
    try:
        device = torch.device(device_type, device_index)
        problem = _abi_problem() or importlib.import_module("attnres.kernels.operator").problem(backend, device, dtype)
    except ImportError:
        if backend == "cpu":
            return None
        problem = "attnres is not installed; pip install attention-residuals[triton]"
    if problem is None:
        return backend
    warnings.warn(f'depth_implementation="{implementation}" falls back to "eager": {problem}', stacklevel=2)
    return None


def _abi_problem() -> str | None:
    abi = getattr(importlib.import_module("attnres.kernels"), "ABI", 1)
    if abi == KERNEL_ABI:
        importlib.import_module("attnres.kernels.operator")  # registers the operator
        return None
    return (
        f"the kernels of the installed attnres have ABI {abi}, these files need ABI {KERNEL_ABI}; install the "
        "version of attnres that saved this folder, or save the folder again"
    )


def fused_mixture(
    backend: str,
    sources: Sequence[torch.Tensor],
    query: torch.Tensor,
    eps: float,
    norm: Norm | None,
    scale: float,
    keep_weights: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes `attention_residual`, and the norm that follows, by the fused operator.

    Args:
        backend: the result of `fused_backend`.
        sources, query, eps, scale: as in `attention_residual`.
        norm: the norm that follows, or `None`.
        keep_weights: whether the depth weights are needed.

    Returns:
        The scaled mixture `[B, T, D]`, normed if `norm` is given, in the dtype of the sources; and the depth weights
        `[B, T, n]`, float32, or possibly `None` without `keep_weights`.
    """
    weight, offset, norm_eps = norm or (None, 0.0, 0.0)
    arguments = (list(sources), query, eps, weight, offset, norm_eps, scale)
    if backend == "cpu" and not torch.is_grad_enabled() and not in_dispatch_mode():
        # While a token is decoded, torch's dispatcher takes longer than the kernel.
        return _cpu_forward()(*arguments, keep_weights)
    return torch.ops.attnres.mix(*arguments, backend)


@lru_cache
def _cpu_forward():
    return importlib.import_module("attnres.kernels.cpu_backend").forward
