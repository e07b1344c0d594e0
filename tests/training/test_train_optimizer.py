"""Tests which parameters Muon and AdamW get, and that they step like torch's own optimizers."""

from copy import deepcopy

import pytest
import torch
from families import FAMILIES
from helpers import random_attnres, random_tokens
from torch import nn
from transformers import Trainer, TrainingArguments

from attnres.training.optimizer import MuonWithAdamW, backbone_matrices, muon_with_adamw

MUON = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_with(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("shape", [(5, 7, 11), (5, 11, 7)], ids=["wide", "tall"])
def test_each_matrix_of_a_stack_moves_as_a_parameter_of_its_own(shape):
    stack = nn.Parameter(random(*shape))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together = MuonWithAdamW([{"params": [stack]}], [{"params": [nn.Parameter(random(3))]}], MUON, ADAMW)
    separate = torch.optim.Muon(apart, **MUON)
    for seed in range(1, 5):
        gradient = random(*shape, seed=seed)
        stack.grad = gradient.clone()
        together.step()
        step_with(separate, apart, gradient)
        assert torch.equal(stack, torch.stack([each.detach() for each in apart]))
    momentum = torch.stack([separate.state[each]["momentum_buffer"] for each in apart])
    assert torch.equal(together.state[stack]["momentum_buffer"], momentum)


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_has_the_matrices_of_the_backbone_and_nothing_else(family):
    model = random_attnres(family)
    names = backbone_matrices(model) & set(Trainer.get_decay_parameter_names(None, model))
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head and module.out_features > 1
    }
    assert linear <= names
    stacks = {name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3}
    assert stacks <= names
    assert bool(stacks) == any("expert" in name for name, _ in model.named_parameters())
    for name in names - linear - stacks:
        assert name.endswith(("mlp.gate.weight", "router.weight")), name  # routers that are not nn.Linear


def test_kernels_of_convolutions_are_no_matrices():
    model = random_attnres("llama", layers=2)
    model.model.layers[0].convolution = nn.Conv1d(5, 7, 3)
    assert not [name for name in backbone_matrices(model) if "convolution" in name]


def tiny(family="qwen3_next"):
    """Returns a model with experts, convolutions and single-row gates, and its optimizer."""
    model = random_attnres(family, layers=4).train()
    arguments = TrainingArguments(learning_rate=3e-3, weight_decay=0.1, use_cpu=True, report_to="none")
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return model, muon_with_adamw(model, decayed, arguments)


def backward(model, seed):
    tokens = random_tokens(2, 11, seed)
    model(tokens, labels=tokens).loss.backward()


def test_both_parts_together_step_as_torchs_two_optimizers_do():
    model, optimizer = tiny()
    other, _ = tiny()
    decayed = set(Trainer.get_decay_parameter_names(None, other))
    named = dict(other.named_parameters())
    matrices = backbone_matrices(other)
    apart = {name: list(named[name].detach().clone().view(-1, *named[name].shape[-2:])) for name in matrices}
    muon = torch.optim.Muon(
        [matrix for stack in apart.values() for matrix in stack],
        lr=3e-3,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if name in decayed - matrices], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
        ],
        lr=3e-3,
    )
    for seed in range(3):
        backward(model, seed)
        backward(other, seed)
        for name, stack in apart.items():
            for matrix, gradient in zip(stack, named[name].grad.view(-1, *stack[0].shape), strict=True):
                matrix.grad = gradient
        for each in (optimizer, muon, adamw):
            each.step()
        with torch.no_grad():
            for name, stack in apart.items():
                named[name].copy_(torch.stack(stack).view_as(named[name]))
        model.zero_grad()
        other.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_a_loaded_state_goes_on_to_the_bit():
    model, optimizer = tiny()
    other, again = tiny()
    backward(model, 0)
    optimizer.step()
    model.zero_grad()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))  # load_state_dict does not copy the tensors
    for each, stepping in ((model, optimizer), (other, again)):
        backward(each, 1)
        stepping.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_a_schedule_moves_the_rate_of_all_groups():
    model, optimizer = tiny()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    backward(model, 0)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_weight_decay_leaves_the_depth_mixer_norms_and_biases_where_they_are():
    """With zero gradients, only weight decay changes the weights."""
    model, optimizer = tiny("gpt_oss")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert kept == {name for name in before if "norm" in name or "bias" in name}
    assert sum("depth_mixer" in name for name in kept) == 6
