"""Trains a model of the demo with transformers' Trainer, on batches that all models see in the same order.

Shapes: N sequences, T tokens per sequence.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..messages import say
from .evaluation import held_out_loss
from .settings import Settings

OptimizerState = dict[str, dict[str, torch.Tensor]]  # AdamW's moments by parameter name


@dataclass
class History:
    """Losses of a model in nats per token; steps count from the start of the whole budget."""

    train_steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_steps: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


class BeforeStep(TrainerCallback):
    """Calls a function before each step with the number of finished steps."""

    def __init__(self, call: Callable[[int], None]):
        self.call = call

    def on_step_begin(self, args, state, control, **kwargs):
        self.call(state.global_step)


def batch_trainer(
    model: torch.nn.Module, sequences: torch.Tensor, settings: Settings, folder: Path, **options
) -> Trainer:
    """Returns a Trainer that takes its batches in order from sequences `[N, T]`, saves nothing and prints nothing."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in sequences]
    trainer = Trainer(model, arguments, train_dataset=rows, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then a cosine down to `final_lr_ratio`."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine


def train_model(
    name: str,
    model: PreTrainedModel,
    sequences: torch.Tensor,
    held_out: torch.Tensor,
    settings: Settings,
    folder: Path,
    start: OptimizerState | None = None,
    at_half_way: Callable[[PreTrainedModel, OptimizerState], None] | None = None,
) -> History:
    """Trains `model` in place to the end of the budget, on the `sequences` `[steps * batch_size, T]` in their order.

    The loss of `held_out` `[N, T]` is measured every `eval_every` steps. `at_half_way` is called after `half_way_step`
    steps with the model and its optimizer state, with which another training can `start` there.
    """
    first = 0 if start is None else settings.half_way_step

    def before_step(done: int):
        step = first + done
        if at_half_way is not None and step == settings.half_way_step:
            at_half_way(model, {key: deepcopy(optimizer.state[each]) for key, each in model.named_parameters()})
        if done == 0 or step % settings.eval_every == 0 or step == settings.steps:
            began = time.perf_counter()
            history.held_out_steps.append(step)
            history.held_out_loss.append(held_out_loss(model, held_out, settings.eval_batch_size))
            history.seconds -= time.perf_counter() - began  # measuring is not training
            say(f"train {name}: step {step} of {settings.steps}, held-out loss {history.held_out_loss[-1]:.3f}")

    history = History()
    rows = sequences[first * settings.batch_size :]
    trainer = batch_trainer(model, rows, settings, folder, callbacks=[BeforeStep(before_step)])
    optimizer = trainer.create_optimizer()
    for key, parameter in model.named_parameters():
        # Parameters that the checkpoint does not have start without moments, as all parameters did at step 0.
        if start is not None and key in start:
            optimizer.state[parameter] = deepcopy(start[key])
    trainer.lr_scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(first + step, settings))
    started = time.perf_counter()
    trainer.train()
    before_step(settings.steps - first)
    history.seconds += time.perf_counter() - started
    history.train_steps = list(range(first + 1, settings.steps + 1))
    history.train_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    return history
