"""The fused operator `attnres::mix`: scores the sources, mixes them and norms the mixture in one pass over the sources.

    r_i = 1 / sqrt(mean(v_i^2) + eps),   w = softmax_i(q . v_i r_i),   h = scale sum_i w_i v_i,
    y = (norm_weight + norm_offset) h / sqrt(mean(h^2) + norm_eps),  or y = h without a norm

    mix(sources, query, eps, norm_weight, norm_offset, norm_eps, scale, backend) -> (y, w)

The sources are n tensors `[B, T, D]`; `query`, `[D]` and float32, is the pseudo-query times the gain of its key norm;
`norm_weight` is `[D]` or `None`. y is `[B, T, D]` in the dtype of the sources, and w is `[B, T, n]`, float32. In
`mix_backward`, the gradients of y and w may be `None`, and `needs` selects the sources that need a gradient.

torch.compile, torch.export and activation checkpointing (`torch.ops.attnres.mix.default` in a selective policy) see one
operation. It saves the sources by reference and the depth weights for its backward pass.

Shapes: B batch, T tokens, D hidden size, n sources.
"""

import functools
import importlib

import torch

from .self_check import equation

BACKENDS = {"cpu": "cpu_backend", "triton": "triton_backend"}
DEVICES = ("CPU", "CUDA", "XPU")

_library = torch.library.Library("attnres", "DEF")
_library.define(
    "mix(Tensor[] sources, Tensor query, float eps, Tensor? norm_weight, float norm_offset, float norm_eps, "
    "float scale, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "mix_backward(Tensor? output_gradient, Tensor? weights_gradient, Tensor[] sources, Tensor query, float eps, "
    "Tensor weights, Tensor? norm_weight, float norm_offset, float norm_eps, float scale, bool[] needs, "
    "str backend) "
    "-> (Tensor[], Tensor, Tensor)"
)


def problem(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why a back end cannot mix tensors of a dtype on a device, in one line, or `None` if it can."""
    try:
        module = importlib.import_module(f"attnres.kernels.{BACKENDS[backend]}")
    except ImportError as error:
        return f"{' '.join(str(error).split())}; pip install attention-residuals[{backend}]"
    return module.problem(device, dtype)


@functools.cache
def _module(backend: str):
    return importlib.import_module(f"attnres.kernels.{BACKENDS[backend]}")


def _mix(*arguments):
    *arguments, backend = arguments
    return _module(backend).forward(*arguments)


def _mix_backward(*arguments):
    *arguments, backend = arguments
    by_sources, by_query, by_norm = _module(backend).backward(*arguments)
    return by_sources, by_query, by_query.new_empty(0) if by_norm is None else by_norm


for _device in DEVICES:
    _library.impl("mix", _mix, _device)
    _library.impl("mix_backward", _mix_backward, _device)


@torch.library.register_fake("attnres::mix", lib=_library)
def _(sources, *_):
    first = sources[0]
    output = torch.empty_like(first, memory_format=torch.contiguous_format)
    return output, first.new_empty((*first.shape[:-1], len(sources)), dtype=torch.float32)


@torch.library.register_fake("attnres::mix_backward", lib=_library)
def _(output_gradient, weights_gradient, sources, query, eps, weights, norm_weight, *options):
    *_, needs, _backend = options
    by_sources = [
        torch.empty_like(source, memory_format=torch.contiguous_format) if need else source.new_empty(0)
        for source, need in zip(sources, needs, strict=True)
    ]
    size = query.shape if norm_weight is not None else 0
    return by_sources, query.new_empty(query.shape, dtype=torch.float32), query.new_empty(size, dtype=torch.float32)


def _save(ctx, inputs, output):
    sources, query, ctx.eps, norm_weight, *ctx.norm, ctx.backend = inputs  # norm: offset, epsilon, scale
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], query, norm_weight, *sources)


def _backward(ctx, output_gradient, weights_gradient):
    weights, query, norm_weight, *sources = ctx.saved_tensors
    if output_gradient is None and weights_gradient is None:
        return [None] * len(sources), None, None, None, None, None, None, None
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, output_gradient, weights_gradient)
    needs = list(ctx.needs_input_grad[0])
    tensors = (output_gradient, weights_gradient, sources, query, ctx.eps, weights, norm_weight)
    by_sources, by_query, by_norm = torch.ops.attnres.mix_backward(*tensors, *ctx.norm, needs, ctx.backend)
    by_sources = [by if need else None for by, need in zip(by_sources, needs, strict=True)]
    by_norm = None if norm_weight is None else by_norm.to(norm_weight.dtype)
    return by_sources, by_query.to(query.dtype), None, by_norm, None, None, None, None


def _differentiable_backward(ctx, output_gradient, weights_gradient):
    """Differentiates the equation by autograd, for gradients of gradients."""
    _, query, norm_weight, *sources = ctx.saved_tensors
    sources = [source.view_as(source) for source in sources]  # the same tensor may be several sources
    inputs = [*sources, query, *([] if norm_weight is None else [norm_weight])]
    results = equation(sources, query, ctx.eps, norm_weight, *ctx.norm)
    pairs = zip(results, (output_gradient, weights_gradient), strict=True)
    given = [(result, gradient) for result, gradient in pairs if gradient is not None]
    wanted = [each for each in inputs if each.requires_grad]
    outputs, of_outputs = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True))
    gradients = [next(found) if each.requires_grad else None for each in inputs]
    by_norm = None if norm_weight is None else gradients.pop()
    return gradients[:-1], gradients[-1], None, by_norm, None, None, None, None


torch.library.register_autograd("attnres::mix", _backward, setup_context=_save, lib=_library)
