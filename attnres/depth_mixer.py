"""The mixing over depth: pseudo-queries, key norms, scores and weighted sums (paper, sections 3.1 and 3.2).

    h_l = sum_i a_{i->l} v_i,     a_{.->l} = softmax_i( w_l . RMSNorm_l(v_i) )

w_l is the pseudo-query of sublayer l, RMSNorm_l its key norm with a gain of its own, v_i the sources. Pseudo-queries
are parameters, so the logits of a source for all later sublayers are known the moment the source is complete: one
matrix product per source ("score on commit"). A sublayer then only has to softmax a few small logits and to mix.

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources, Q pseudo-queries scored at once.
"""

import importlib
import warnings
from functools import lru_cache

import torch
from torch import nn

from .depth_functions import Norm, is_watched, mixture


class DepthScore(nn.Module):
    """Pseudo-queries with the gains of their key norms, for one place in the decoder layers.

    One module holds both, named `..._norm`, because Trainer exempts parameters from weight decay by that name: decay
    would pull a trained mixture back to a plain average.

    Args:
        shape: leading dimensions of the parameters, `(L,)` for one per decoder layer or `()` for the output.
        hidden_size: D.

    `query` is `[*shape, 1, D]` (the middle dimension is that of the on-disk projection), exactly zero at
    initialisation; `weight` is `[*shape, D]`, exactly one.
    """

    def __init__(self, shape: tuple[int, ...], hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(*shape, 1, hidden_size))
        self.weight = nn.Parameter(torch.ones(*shape, hidden_size))

    def forward(self) -> torch.Tensor:
        """The pseudo-queries times the gains, `[*shape, D]`, float32 or wider: w . (g * x) = (w * g) . x."""
        precision = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.squeeze(-2).to(precision) * self.weight


class DepthMixer(nn.Module):
    """All parameters of the mixing over depth, stacked over decoder layers.

    Args:
        num_layers: decoder layers L.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int):
        super().__init__()
        self.attention_norm = DepthScore((num_layers,), hidden_size)
        self.mlp_norm = DepthScore((num_layers,), hidden_size)
        self.output_norm = DepthScore((), hidden_size)

    def forward(self) -> torch.Tensor:
        """Scaled pseudo-queries sqrt(D) w * g, `[2 L + 1, D]`, float32, in the order attention, MLP, ..., output."""
        attention, mlp, output = self.attention_norm(), self.mlp_norm(), self.output_norm()
        device = attention.device  # a device map may part the three
        sublayers = torch.stack([attention, mlp.to(device)], dim=1).flatten(0, 1)
        queries = torch.cat([sublayers, output.to(device).unsqueeze(0)])
        return queries * queries.shape[-1] ** 0.5


def mix_triton(sources, logits, query, eps):
    """`mixture` by the kernels of the package; where they do not work, eager after one warning that says why."""
    device = sources[0].device
    problem = _triton_problem(device.type, device.index)
    if problem is not None:
        _warn_once(f'depth_implementation="triton" mixes by "eager" instead: {problem}')
    if problem is not None or sources[0].dtype == torch.float64:
        return mixture(sources, logits, query, eps)
    query = None if query is None else query[0] * query.shape[-1] ** -0.5
    return torch.ops.attnres.mix(list(sources), logits, query, eps)[0]


def mix_auto(sources, logits, query, eps, norm=None):
    """By Triton on CUDA, by eager elsewhere; on CPUs a table of `cpu_kernels` comes before it."""
    if logits.device.type == "cuda":
        return mix_triton(sources, logits, query, eps)
    return mixture(sources, logits, query, eps, norm)


@torch.compiler.assume_constant_result
def _triton_problem(device_type: str, device_index: int | None) -> str | None:
    """Why the kernels cannot be used on a device, found out once; `None` where they can."""
    try:
        # By name: in a Hub folder these files stand alone, and a relative import would make the folder look for it.
        kernels = importlib.import_module("attnres.kernels.mix_triton")
    except ImportError as error:
        return f"{' '.join(str(error).split())}; pip install attnres[triton]"
    if device_type not in kernels.DEVICES and not kernels.INTERPRETED:
        return f"its kernels run on {' and '.join(kernels.DEVICES)}, not on {device_type}"
    return kernels.self_check(torch.device(device_type, device_index))


def cpu_kernels(implementation: str, embedding: torch.Tensor):
    """The module whose `SourceTable` mixes on a CPU without autograd; `None` where it does not work: eager mixes then.

    Only for `"auto"`. The kernels come with the package, and not for every dtype; nothing can watch what they compute.
    """
    if implementation != "auto" or embedding.dtype not in (torch.float32, torch.bfloat16):
        return None
    if type(embedding) is not torch.Tensor or embedding.ndim != 3 or is_watched():
        return None
    module, problem = _cpu_kernels(embedding.dtype)
    if problem is not None:
        _warn_once(f"mixing on the CPU is slower than it could be: {problem}")
    return module


@lru_cache
def _cpu_kernels(dtype: torch.dtype) -> tuple:
    """The module, or why there is none; neither where these files stand alone, in a Hub folder."""
    try:
        module = importlib.import_module("attnres.kernels.source_table")
    except ImportError as error:
        away = (error.name or "").partition(".")[0] == "attnres"
        return None, None if away else f"{' '.join(str(error).split())}; pip install numba"
    problem = module.self_check(dtype)
    return (module, None) if problem is None else (None, problem)


@torch.compiler.assume_constant_result
@lru_cache
def _warn_once(message: str):
    warnings.warn(message, stacklevel=2)


DEPTH_IMPLEMENTATIONS = {"auto": mix_auto, "eager": mixture, "triton": mix_triton}


def norms_too(implementation: str, source: torch.Tensor) -> bool:
    """Whether `mix` can be given the norm that follows. Measured on CPUs; a compiler fuses them by itself."""
    eager = implementation in ("auto", "eager")
    return eager and source.device.type == "cpu" and not torch.compiler.is_compiling()


def mix(
    sources: tuple[torch.Tensor, ...],
    logits,
    implementation: str,
    query: torch.Tensor | None = None,
    eps: float = 0.0,
    norm: Norm | None = None,
) -> torch.Tensor:
    """The mixture of the sources by one of the implementations.

    Args:
        sources: n tensors `[B, T, D]`.
        logits: `[B, T, n]`, float32; with a query `[B, T, n - 1]`, without the last source's; or what a table of
            `cpu_kernels` gives, which has the complete sources itself.
        implementation: a key of `DEPTH_IMPLEMENTATIONS`.
        query: `[1, D]`, the scaled pseudo-query that the last source is to be scored with; a table has its own.
        eps: epsilon of its key norm.
        norm: the norm that follows, where `norms_too` allows it.

    Returns:
        The mixture or what the norm makes of it, `[B, T, D]` in the dtype of the sources. A single source that is not
        to be normed is passed through.
    """
    if not isinstance(logits, torch.Tensor):
        mixed = logits.mix(sources[1] if len(sources) == 2 else None, norm)
        return mixed if mixed.dtype == sources[0].dtype else mixed.to(sources[0].dtype)
    if norm is not None:
        return DEPTH_IMPLEMENTATIONS[implementation](sources, logits, query, eps, norm)
    return sources[0] if len(sources) == 1 else DEPTH_IMPLEMENTATIONS[implementation](sources, logits, query, eps)
