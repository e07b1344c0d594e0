"""Runs in each of the two processes that test_train_processes.py starts, and writes the results of the process.

torchrun --standalone --nproc-per-node 2 training_ranks.py MODEL DATA FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from tiny_train import command_line
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from attnres.cli import main
from attnres.training.command import run
from attnres.training.optimizer import MuonWithAdamW
from attnres.training.trainer import RunTrainer

model, data, top = sys.argv[1], sys.argv[2], Path(sys.argv[3])


# Without a GPU, transformers 5.17 loads the optimizer of several processes onto "cpu:0", which torch does not know.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


class Interrupted(Exception):
    pass


def interrupted_and_resumed():
    """Trains a run that every process leaves in its fourth step, resumes it, and trains it without interruption."""
    line = command_line(model, data, top / "resumed", streaming=True, optimizer="muon", save_steps=2)
    usual = RunTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Interrupted
        return usual(self, *args, **kwargs)

    RunTrainer.training_step = step
    try:
        run(line)
    except Interrupted:
        RunTrainer.training_step = usual
        run([*line, "--resume"])
    run(command_line(model, data, top / "whole", streaming=True, optimizer="muon", save_steps=2))


def nan_in_the_second() -> int:
    """Returns the exit status of a run in which the loss of one process is NaN."""
    usual = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = usual(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 2 and torch.distributed.get_rank() == 1 else loss

    Trainer.compute_loss = compute_loss
    try:
        return main(["train", *command_line(model, data, top / "nan", gradient_accumulation_steps=2)])
    finally:
        Trainer.compute_loss = usual


class Stacks(nn.Module):
    """A model with a matrix and an uneven stack of matrices."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 11, generator=generator))
        self.stack = nn.Parameter(torch.randn(5, 7, 11, generator=generator))

    def forward(self, hidden_states):
        return (hidden_states @ self.matrix.T).square().sum() + (hidden_states @ self.stack.mT).square().sum()


def sharded_muon() -> dict[str, float]:
    """Returns the largest differences between sharded and whole parameters after three steps of Muon."""
    whole, divided = Stacks(), Stacks()
    fully_shard(divided, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    for each in (whole, divided):
        options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        other = nn.Parameter(torch.zeros(2))
        optimizer = MuonWithAdamW([{"params": list(each.parameters())}], [{"params": [other]}], options, {})
        for seed in range(3):
            each(torch.randn(29, 11, generator=torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = {}
    for name, parameter in divided.named_parameters():
        assert isinstance(parameter, DTensor)
        found[name] = (parameter.full_tensor() - whole.get_parameter(name)).abs().max().item()
    return found


interrupted_and_resumed()
outcome = {"status": nan_in_the_second(), "muon": sharded_muon()}
(top / f"outcome-{torch.distributed.get_rank()}.json").write_text(json.dumps(outcome))
torch.distributed.destroy_process_group()
