"""The fused operator `attnres::mix`: scores the sources, mixes them, and norms the mixture, in one pass over them.

    r_i = 1 / sqrt(mean(v_i^2) + eps),   w = softmax_i(q . v_i r_i),   h = scale sum_i w_i v_i,
    y = (norm_weight + norm_offset) h / sqrt(mean(h^2) + norm_eps),  or y = h without a norm

torch.compile, torch.export and activation checkpointing (`torch.ops.attnres.mix.default` in a selective policy) see one
operation. Saved for the backward pass: the sources by reference, and the depth weights.

Shapes: B batch, T tokens, D hidden size, n sources.
"""

import importlib

import torch

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
    """Why a back end cannot mix tensors of a dtype on a device, in one line; `None` where it can."""
    try:
        module = importlib.import_module(f"attnres.kernels.{BACKENDS[backend]}")
    except ImportError as error:
        return f"{' '.join(str(error).split())}; pip install attention-residuals[{backend}]"
    return module.problem(device, dtype)


def _module(backend: str):
    return _modules.get(backend) or _modules.setdefault(
        backend, importlib.import_module(f"attnres.kernels.{BACKENDS[backend]}")
    )


_modules: dict = {}


def _mix(sources, query, eps, norm_weight, norm_offset, norm_eps, scale, backend):
    return _module(backend).forward(sources, query, eps, norm_weight, norm_offset, norm_eps, scale)


def _mix_backward(
    output_gradient,
    weights_gradient,
    sources,
    query,
    eps,
    weights,
    norm_weight,
    norm_offset,
    norm_eps,
    scale,
    needs,
    backend,
):
    by_sources, by_query, by_norm = _module(backend).backward(
        output_gradient,
        weights_gradient,
        sources,
        query,
        eps,
        weights,
        norm_weight,
        norm_offset,
        norm_eps,
        scale,
        needs,
    )
    return by_sources, by_query, query.new_empty(0) if by_norm is None else by_norm


for _device in DEVICES:
    _library.impl("mix", _mix, _device)
    _library.impl("mix_backward", _mix_backward, _device)


@torch.library.register_fake("attnres::mix", lib=_library)
def _(sources, query, eps, norm_weight, norm_offset, norm_eps, scale, backend):
    first = sources[0]
    output = torch.empty_like(first, memory_format=torch.contiguous_format)
    return output, first.new_empty((*first.shape[:-1], len(sources)), dtype=torch.float32)


@torch.library.register_fake("attnres::mix_backward", lib=_library)
def _(
    output_gradient,
    weights_gradient,
    sources,
    query,
    eps,
    weights,
    norm_weight,
    norm_offset,
    norm_eps,
    scale,
    needs,
    backend,
):
    by_sources = [
        torch.empty_like(source, memory_format=torch.contiguous_format) if need else source.new_empty(0)
        for source, need in zip(sources, needs, strict=True)
    ]
    size = query.shape if norm_weight is not None else 0
    return by_sources, query.new_empty(query.shape, dtype=torch.float32), query.new_empty(size, dtype=torch.float32)


def _save(ctx, inputs, output):
    sources, query, ctx.eps, norm_weight, ctx.norm_offset, ctx.norm_eps, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], query, norm_weight, *sources)


def _backward(ctx, output_gradient, weights_gradient):
    weights, query, norm_weight, *sources = ctx.saved_tensors
    if output_gradient is None and weights_gradient is None:
        return [None] * len(sources), None, None, None, None, None, None, None
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, output_gradient, weights_gradient)
    needs = list(ctx.needs_input_grad[0])
    by_sources, by_query, by_norm = torch.ops.attnres.mix_backward(
        output_gradient,
        weights_gradient,
        sources,
        query,
        ctx.eps,
        weights,
        norm_weight,
        ctx.norm_offset,
        ctx.norm_eps,
        ctx.scale,
        needs,
        ctx.backend,
    )
    by_sources = [by if need else None for by, need in zip(by_sources, needs, strict=True)]
    by_norm = None if norm_weight is None else by_norm.to(norm_weight.dtype)
    return by_sources, by_query.to(query.dtype), None, by_norm, None, None, None, None


def _differentiable_backward(ctx, output_gradient, weights_gradient):
    """Where gradients of gradients are wanted: the formula once more, differentiated by autograd."""
    _, query, norm_weight, *sources = ctx.saved_tensors
    sources = [source.view_as(source) for source in sources]  # one tensor may be several of them
    inputs = [*sources, query, *([] if norm_weight is None else [norm_weight])]
    output, weights = _formula(sources, query, ctx.eps, norm_weight, ctx.norm_offset, ctx.norm_eps, ctx.scale)
    given = [(o, g) for o, g in ((output, output_gradient), (weights, weights_gradient)) if g is not None]
    wanted = [each for each in inputs if each.requires_grad]
    gradients = iter(
        torch.autograd.grad(
            [output for output, _ in given],
            wanted,
            [gradient for _, gradient in given],
            create_graph=True,
            allow_unused=True,
        )
    )
    gradients = [next(gradients) if each.requires_grad else None for each in inputs]
    by_norm = None if norm_weight is None else gradients.pop()
    return gradients[:-1], gradients[-1], None, by_norm, None, None, None, None


def _formula(sources, query, eps, norm_weight, norm_offset, norm_eps, scale):
    values = torch.stack(sources, dim=2).to(query.dtype)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weights = torch.softmax((keys * query).sum(-1), dim=-1)
    mixed = ((scale * weights).unsqueeze(-1) * values).sum(2)
    if norm_weight is not None:
        mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + norm_eps)
        mixed = mixed * (norm_weight.to(mixed.dtype) + norm_offset)
    return mixed.to(sources[0].dtype), weights


torch.library.register_autograd("attnres::mix", _backward, setup_context=_save, lib=_library)
