"""The equation of `attnres::mix` in plain torch, to which the kernels are compared."""

import torch


def mix(sources, query, eps, gain, offset, norm_eps, scale):
    """Returns the output and the weights in the dtype of the query; without a gain the mixture is not normed."""
    values = torch.stack(sources, dim=2)
    weights = torch.softmax((values * query).sum(-1) * torch.rsqrt(values.square().mean(-1) + eps), dim=-1)
    mixed = scale * (weights.unsqueeze(-1) * values).sum(2)
    if gain is not None:
        mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + norm_eps) * (gain + offset)
    return mixed, weights
