"""Chooses what mixes over depth: the formula of `depth_mixer`, or the fused operator `attnres::mix` of the package.

The operator is reached by name: these files also travel to the Hub as remote code, where the package may be missing or
of another version. Shapes: B batch, T tokens, D hidden size, n sources.
"""

import importlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from .torch_internals import in_dispatch_mode, in_function_transform, is_fake

# Of the operator's arguments and results. Raised with every change, so that files in a saved folder never call an
# operator that means something else.
KERNEL_ABI = 3

DEPTH_IMPLEMENTATIONS = ("auto", "eager", "triton")


class Norm(NamedTuple):
    """An RMSNorm: its gain `[D]`, what is added to the gain (1 in Gemma), and its epsilon."""

    weight: torch.Tensor
    offset: float
    eps: float


def fused_backend(implementation: str, source: torch.Tensor) -> str | None:
    """The back end of `attnres::mix` that mixes a source like this one, "cpu" or "triton"; `None`: the formula does.

    "auto" takes the operator wherever it runs. On CPUs compilers get the formula, which they fuse themselves. "triton"
    warns once where it cannot run.
    """
    if implementation == "eager":
        return None
    device = source.device
    if _is_compiling():
        if device.type == "cpu" and implementation == "auto":
            return None
    else:  # asked for every token
        if in_function_transform():
            return None
        if implementation == "triton" and is_fake(source) and _abi_problem() is None:
            return "triton"  # whatever the device at hand
    return _backend(implementation, device.type, device.index, source.dtype)


def _is_compiling() -> bool:
    return torch.compiler.is_compiling()


@torch.compiler.assume_constant_result  # not traced into, as a compiler would trace a cached function
def _backend(implementation: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    return _find_backend(implementation, device_type, device_index, dtype)


@lru_cache
def _find_backend(implementation: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    backend = "cpu" if implementation == "auto" and device_type == "cpu" else "triton"
    if implementation == "auto" and device_type not in ("cpu", "cuda"):
        return None
    if dtype == torch.float64:
        return None  # the kernels compute in float32
    problem = _problem(backend, torch.device(device_type, device_index), dtype)
    if problem is None:
        return backend
    if problem:
        _warn_once(f'depth_implementation="{implementation}" mixes by "eager" instead: {problem}')
    return None


@lru_cache
def _warn_once(message: str):
    warnings.warn(message, stacklevel=2)


def _problem(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end cannot be used; empty where there is nothing to say."""
    try:
        problem = _abi_problem()
    except ImportError:
        return "" if backend == "cpu" else "attnres is not installed; pip install attention-residuals[triton]"
    return problem or importlib.import_module("attnres.kernels.operator").problem(backend, device, dtype)


def _abi_problem() -> str | None:
    abi = getattr(importlib.import_module("attnres.kernels"), "ABI", 1)
    if abi == KERNEL_ABI:
        importlib.import_module("attnres.kernels.operator")  # registers it
        return None
    return (
        f"the kernels of the installed attnres have ABI {abi}, these files need ABI {KERNEL_ABI}: install the "
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
    """`attention_residual` by the fused operator, and the norm that follows.

    Args:
        backend: what `fused_backend` gave.
        sources, query, eps: as in `attention_residual`.
        norm: the norm that follows, or `None`.
        scale: a factor on the mixture.
        keep_weights: whether the depth weights are wanted.

    Returns:
        The scaled mixture or what the norm makes of it, `[B, T, D]` in the dtype of the sources; and the depth weights
        `[B, T, n]`, float32, which may be `None` where they are not wanted.
    """
    weight, offset, norm_eps = norm or (None, 0.0, 0.0)
    arguments = (list(sources), query, eps, weight, offset, norm_eps, scale)
    if backend == "cpu" and not torch.is_grad_enabled() and not in_dispatch_mode():
        # While a token is decoded, the way through torch's dispatcher takes longer than the kernel.
        return _cpu_forward()(*arguments, keep_weights)
    return torch.ops.attnres.mix(*arguments, backend)


@lru_cache
def _cpu_forward():
    return importlib.import_module("attnres.kernels.cpu_backend").forward
