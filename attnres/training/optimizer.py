"""Muon for the backbone's matrices and AdamW for all other parameters, as one optimizer."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import TrainingArguments


class _MatrixMuon(torch.optim.Muon):
    """`torch.optim.Muon` that also takes stacks of matrices `[E, N, M]` and updates each matrix on its own."""

    def __init__(self, groups: list[dict], **defaults):
        # The constructor of Muon refuses parameters that are not 2D, but add_param_group accepts them.
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
    """Returns the matrices of a tensor as views; of a sharded stack, those of this process."""
    if tensor.ndim == 2:
        return [tensor]
    if isinstance(tensor, DTensor):
        if any(placement not in (Shard(0), Replicate()) for placement in tensor.placements):
            raise ValueError(
                f"--optimizer muon needs stacks of matrices to be sharded by their first dimension, got "
                f"{list(tensor.shape)} with {tensor.placements}; use --optimizer adamw"
            )
        tensor = tensor.to_local()
    return list(tensor.unbind())


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer.

    Both work on the parameter groups and the state of this object, so that schedulers, gradient clipping, checkpoints
    and accelerate treat it like any other optimizer.

    Args:
        muon_groups: parameter groups of `torch.optim.Muon`.
        adamw_groups: parameter groups of `torch.optim.AdamW`.
        muon: options of `torch.optim.Muon`.
        adamw: options of `torch.optim.AdamW`.
    """

    def __init__(self, muon_groups: list[dict], adamw_groups: list[dict], muon: dict, adamw: dict):
        self.parts = [_MatrixMuon(muon_groups, **muon), torch.optim.AdamW(adamw_groups, **adamw)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        muon, adamw = self.parts
        muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        muon.state = adamw.state = self.state

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self._share()

    def step(self, closure=None):
        """Makes a step with the gradients of the parameters; Trainer passes no closure."""
        for part in self.parts:
            part.step()


def muon_with_adamw(model: nn.Module, decayed: set[str], arguments: TrainingArguments) -> MuonWithAdamW:
    """Returns the optimizer of a model; weight decay applies to the parameters named in `decayed`."""
    matrices = backbone_matrices(model) & decayed
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def group(names: set[str], **options) -> dict:
        return {"params": [parameter for name, parameter in trained.items() if name in names], **options}

    common = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
    return MuonWithAdamW(
        [group(matrices)],
        [group(decayed - matrices), group(trained.keys() - decayed, weight_decay=0.0)],
        # match_rms_adamw scales updates to the size of AdamW's, so that both take the same learning rate.
        muon={**common, "adjust_lr_fn": "match_rms_adamw"},
        adamw={**common, "betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon},
    )


def backbone_matrices(model: nn.Module) -> set[str]:
    """Returns the names of the matrices, and stacks of matrices, that map hidden states within the backbone.

    This leaves out the embedding and the head, which map tokens; the depth mixer, whose pseudo-queries are vectors;
    kernels of convolutions, which act on each channel alone; and single rows, which are vectors too.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    of_tokens = {id(module.weight) for module in modules if module is not None}
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Conv1d)):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            is_matrix = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1
            if is_matrix and "depth_mixer." not in name and id(parameter) not in of_tokens:
                names.add(name)
    return names
