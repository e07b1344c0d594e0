"""Muon for the backbone's matrices and AdamW for everything else, as one optimizer."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import TrainingArguments


class _MatrixMuon(torch.optim.Muon):
    """`torch.optim.Muon` that takes stacks of matrices, `[E, N, M]`, too: each is a matrix of its own."""

    def __init__(self, groups: list[dict], **defaults):
        # Muon refuses what is not 2D when it is made; groups that come later are not looked at.
        super().__init__([{"params": []}], **defaults)
        self.param_groups.clear()
        for group in groups:
            self.add_param_group(group)

    def _init_group(self, group, params_with_grad, grads, muon_momentum_bufs) -> bool:
        has_complex = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [matrix for tensor in tensors for matrix in _matrices(tensor)]
        return has_complex


def _matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views: a part of a divided stack would be a copy, so that each process takes the matrices that it has itself."""
    if tensor.ndim == 2:
        return [tensor]
    if isinstance(tensor, DTensor):
        if any(placement not in (Shard(0), Replicate()) for placement in tensor.placements):
            raise ValueError(
                f"Muon needs the matrices of a stack {list(tensor.shape)} whole, got {tensor.placements}: divide it by "
                "its first dimension, or use --optimizer adamw"
            )
        tensor = tensor.to_local()
    return [tensor[index] for index in range(len(tensor))]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that share their groups and their state with this one.

    Groups and state are those of this object, so that schedules, clipping, checkpoints and what accelerate puts into
    the groups instead of the parameters work as with any optimizer.

    Args:
        muon_groups, adamw_groups: parameter groups as torch's optimizers take them.
        muon, adamw: options of `torch.optim.Muon` and `torch.optim.AdamW`.
    """

    def __init__(self, muon_groups: list[dict], adamw_groups: list[dict], muon: dict, adamw: dict):
        self.parts = [_MatrixMuon(muon_groups, **muon), torch.optim.AdamW(adamw_groups, **adamw)]
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self):
        """The parts work on this object's groups, of which those of Muon come first, and write into its state."""
        muon, adamw = self.parts
        muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        muon.state = adamw.state = self.state

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def muon_with_adamw(model: nn.Module, decayed: set[str], arguments: TrainingArguments) -> MuonWithAdamW:
    """The optimizer of a model.

    Args:
        decayed: names of the parameters that weight decay is for.
    """
    matrices = backbone_matrices(model) & decayed
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def of(names) -> list[nn.Parameter]:
        return [parameter for name, parameter in trained.items() if name in names]

    return MuonWithAdamW(
        [{"params": of(matrices)}],
        [
            {"params": of(decayed - matrices), "weight_decay": arguments.weight_decay},
            {"params": of(trained.keys() - decayed), "weight_decay": 0.0},
        ],
        # An update of the size that AdamW's has: both take the same learning rate and weight decay.
        muon={
            "lr": arguments.learning_rate,
            "weight_decay": arguments.weight_decay,
            "adjust_lr_fn": "match_rms_adamw",
        },
        adamw={
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
        },
    )


def backbone_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices, and of the stacks of matrices, that map hidden states within the backbone.

    Not the embedding and the head, which map tokens; not the depth mixer, whose pseudo-queries are vectors; not kernels
    of convolutions, whose channels are apart; not a single row, which is a vector, too.
    """
    of_tokens = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Conv1d)):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            matrices = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1
            if matrices and "depth_mixer." not in name and id(parameter) not in of_tokens:
                names.add(name)
    return names
