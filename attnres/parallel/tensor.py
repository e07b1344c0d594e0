"""Tensor parallelism inside pipeline stages: transformers divides a stage by the plan of the backbone's family."""

import re
from collections.abc import Iterable
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from ..modeling_attnres import AttnResForCausalLM
from .stage import AttnResStage

# The plan's style for norms over divided heads: whole on every rank, with gradients of the rank's own heads only.
# transformers (5.23) sums these gradients over the ranks after every backward pass, including what earlier
# micro-batches have left in them. Here they are summed once per step.
SUMMED = "replicated_with_grad_allreduce"


def check_division(model: AttnResForCausalLM, ranks: int):
    """Checks that a model can be divided among `ranks` ranks."""
    if not model.tp_plan:
        family = model.config.backbone_config.model_type
        raise ValueError(f'transformers has no tensor-parallel plan for {family}; use a mesh without a dimension "tp".')
    model.maybe_distribute_model(model, DistributedConfig(tp_size=ranks), None)  # without a mesh it only checks


def divide(stage: AttnResStage, plan: dict[str, str], mesh: DeviceMesh) -> list[nn.Parameter]:
    """Replaces the parameters of a whole stage by this rank's parts, by the `tp_plan` of the whole model.

    Returns:
        The parameters whose gradients have to be added up over the mesh, which has one dimension.
    """
    summed = {name for name, style in plan.items() if style == SUMMED}
    plan = {name: style for name, style in plan.items() if name not in summed}
    if "tp_plan" in signature(apply_tensor_parallelism).parameters:
        apply_tensor_parallelism(stage, mesh, stage._expand_parallel_plan(plan))
    else:  # transformers 5.17 takes the plan from the model
        stage._tp_plan = plan
        apply_tensor_parallelism(stage, mesh)
    modules = (module for name, module in stage.named_modules() if re.sub(r"\b\d+\b", "*", name) in summed)
    return [parameter for module in modules for parameter in module.parameters()]


def start_alike(stages: nn.Module, group: dist.ProcessGroup):
    """Copies the parameters and buffers of the group's first rank to all of its ranks."""
    for each in (*stages.parameters(), *stages.buffers()):
        dist.broadcast(local(each.detach()), group_src=0, group=group)


def settle_gradients(parameters: Iterable[nn.Parameter], summed: Iterable[nn.Parameter], mesh: DeviceMesh):
    """Completes the gradients of this rank's parameters and divides each gradient as its parameter is divided.

    Those of the `summed` parameters, which `divide` has returned, are added up over the mesh.
    """
    for parameter in summed:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=mesh.get_group())
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            if gradient.placements != parameter.placements:  # autograd leaves some as partial sums
                gradient = gradient.redistribute(placements=parameter.placements)
            parameter.grad = gradient.contiguous()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a tensor as a view, or the tensor itself if it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor, gathered if it is divided."""
    if not isinstance(tensor, DTensor):
        return tensor
    (place,) = tensor.placements
    if not hasattr(place, "split_factor"):
        return tensor.full_tensor()
    # Every rank has a part of each of several matrices in one, such as gate and up, which torch 2.11 does not gather.
    parts = [torch.empty_like(tensor.to_local()) for _ in range(tensor.device_mesh.size())]
    dist.all_gather(parts, tensor.to_local().contiguous(), group=tensor.device_mesh.get_group())
    of_matrices = zip(*(part.chunk(place.split_factor, place.dim) for part in parts), strict=True)
    return torch.cat([part for matrix in of_matrices for part in matrix], place.dim)


def is_divided(tensor: torch.Tensor) -> bool:
    """Returns whether the ranks have different parts of a tensor."""
    return isinstance(tensor, DTensor) and not all(each.is_replicate() for each in tensor.placements)


def division(tensor: torch.Tensor) -> str:
    """Returns a description of how a tensor is divided, equal for tensors that are divided the same way."""
    return str(tuple(tensor.placements)) if is_divided(tensor) else "whole"
