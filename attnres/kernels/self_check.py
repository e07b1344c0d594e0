"""Compares a back end of `attnres::mix` with the equation in float64, once per process, device and dtype."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def equation(sources, query, eps, norm_weight, norm_offset, norm_eps, scale):
    """Computes `attnres::mix` in the dtype of the query by operations that autograd can differentiate."""
    values = torch.stack(tuple(sources), dim=2).to(query.dtype)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weights = torch.softmax((keys * query).sum(-1), dim=-1)
    mixed = ((scale * weights).unsqueeze(-1) * values).sum(2)
    if norm_weight is not None:
        mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + norm_eps)
        mixed = mixed * (norm_weight.to(mixed.dtype) + norm_offset)
    return mixed.to(sources[0].dtype), weights


def compare(forward: Callable, backward: Callable, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns which result on small random sources is wrong, in one line, or `None` if all are right.

    The check runs in a thread of its own. It is then independent of what the caller's thread has switched on (inference
    mode, autocast, a default device, a recorder of operations, the saved-tensor hooks of activation checkpointing).
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_compare, forward, backward, device, dtype).result()


def _compare(forward, backward, device, dtype):
    generator = torch.Generator("cpu").manual_seed(0)
    n, size, rows, eps, offset, norm_eps, scale = 6, 1031, (1, 3), 1e-5, 1.0, 1e-6, 2.0

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    sources, query, gain = random(n, *rows, size).to(dtype), random(size).float() / 8, random(size).to(dtype)
    sides = random(*rows, size).to(dtype), random(*rows, n).float()

    *exact, q, g = (tensor.double().requires_grad_() for tensor in (*sources, query, gain))
    wanted = equation(exact, q, eps, g, offset, norm_eps, scale)
    of_exact = torch.autograd.grad(wanted, (*exact, q, g), [side.double() for side in sides])

    sources, query, gain = [source.to(device) for source in sources], query.to(device), gain.to(device)
    norm = gain, offset, norm_eps, scale
    found = forward(sources, query, eps, *norm)
    sides = [side.to(device) for side in sides]
    of_sources, of_query, of_gain = backward(*sides, sources, query, eps, found[1], *norm, [True] * n)
    names = ["output", "weights", *(f"gradient of source {i}" for i in range(n))]
    names += ["gradient of the query", "gradient of the norm weight"]
    found, exact = (*found, *of_sources, of_query, of_gain), (*wanted, *of_exact)
    for name, value, truth in zip(names, found, exact, strict=True):
        error = ((value.cpu().double() - truth).abs().max() / truth.abs().max()).item()
        if not error < TOLERANCES[dtype]:
            return f"{name} in {dtype} is off by {error:.1e} of its largest value (tolerance {TOLERANCES[dtype]})"
    return None
