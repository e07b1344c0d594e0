"""Tensor parallelism inside pipeline stages: transformers divides them, by the plan of the backbone's family."""

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

# Of norms over divided heads: whole on every rank, with a gradient of the rank's own heads. transformers (5.23) sums it
# over the ranks after every backward pass, with what earlier micro-batches have left in it: here it is summed once.
SUMMED = "replicated_with_grad_allreduce"


def check_division(model: AttnResForCausalLM, ranks: int):
    """Raises ValueError where a model cannot be divided among that many ranks."""
    if not model.tp_plan:
        family = model.config.backbone_config.model_type
        raise ValueError(
            f'this transformers has no tensor-parallel plan for {family}: take a mesh without a dimension "tp".'
        )
    model.maybe_distribute_model(model, DistributedConfig(tp_size=ranks), None)  # checks only, without a mesh


def divide(stage: AttnResStage, plan: dict[str, str], mesh: DeviceMesh) -> list[nn.Parameter]:
    """Leaves this rank its part of a stage that is whole on all ranks of a mesh.

    Args:
        stage: whole.
        plan: `tp_plan` of the whole model.
        mesh: of one dimension.

    Returns:
        Parameters whose gradients have to be added up over the mesh.
    """
    summed = {name for name, style in plan.items() if style == SUMMED}
    plan = {name: style for name, style in plan.items() if name not in summed}
    if "tp_plan" in signature(apply_tensor_parallelism).parameters:
        apply_tensor_parallelism(stage, mesh, stage._expand_parallel_plan(plan))
    else:  # transformers 5.17 takes the plan from the model
        stage._tp_plan = plan
        apply_tensor_parallelism(stage, mesh)
    modules = (module for name, module in stage.named_modules() if _wildcard(name) in summed)
    return [parameter for module in modules for parameter in module.parameters()]


def _wildcard(name: str) -> str:
    """A module's name as plans have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def start_alike(stage: AttnResStage, mesh: DeviceMesh):
    """Gives a stage that was drawn at random the values that the first rank of a mesh has drawn."""
    for tensor in (*stage.parameters(), *stage.buffers()):
        dist.broadcast(tensor.detach(), group_src=0, group=mesh.get_group())


def settle_gradients(parameters: Iterable[nn.Parameter], summed: Iterable[nn.Parameter], mesh: DeviceMesh):
    """Divides every gradient as its parameter is; autograd leaves some as a partial sum of each rank.

    Args:
        parameters: all of this rank.
        summed: as `divide` has returned them.
        mesh: of one dimension.
    """
    for parameter in summed:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=mesh.get_group())
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            if gradient.placements != parameter.placements:
                gradient = gradient.redistribute(placements=parameter.placements)
            parameter.grad = gradient.contiguous()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, a view; of a tensor that is not divided all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether the ranks have different parts of it."""
    return isinstance(tensor, DTensor) and not all(each.is_replicate() for each in tensor.placements)


def division(tensor: torch.Tensor) -> str:
    """How it is divided, in words that are the same where it is divided the same way."""
    return str(tuple(tensor.placements)) if is_divided(tensor) else "whole"
