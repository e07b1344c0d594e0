"""Training of one model with transformers' Trainer, on batches whose content and order the models share.

Shapes: N sequences, T tokens per sequence.
"""

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .evaluation import held_out_loss
from .settings import Settings

OptimizerState = dict[str, dict[str, torch.Tensor]]


@dataclass
class History:
    """The history of one model: losses in nats per token, by optimiser step of the whole budget."""

    first_step: int
    train_loss: list[float] = field(default_factory=list)
    held_out_steps: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    batch_digests: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def curves(self) -> dict[str, list]:
        """Steps and losses, on the training batches and on the held-out text, as plain lists."""
        return {
            "train_steps": list(range(self.first_step + 1, self.first_step + 1 + len(self.train_loss))),
            "train_loss": self.train_loss,
            "held_out_steps": self.held_out_steps,
            "held_out_loss": self.held_out_loss,
        }


@dataclass(frozen=True)
class HalfWay:
    """Where a model that starts half-way goes on: the step, and the optimizer state by parameter name."""

    step: int
    optimizer_state: OptimizerState


class Sequences(torch.utils.data.Dataset):
    """Token sequences `[N, T]` as Trainer wants them, every token a label."""

    def __init__(self, sequences: torch.Tensor):
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to `final_lr_ratio`; 1 is the peak learning rate."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine


class _ArmTrainer(Trainer):
    """Trainer that can take over a schedule and an optimizer state at a step, and records what it is fed."""

    def __init__(self, *args, settings: Settings, start: HalfWay | None, history: History, **kwargs):
        self.settings, self.start, self.history = settings, start, history
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.start is not None:
            for name, parameter in self.model.named_parameters():
                # Parameters that the checkpoint does not have start like all did: without a state.
                if name in self.start.optimizer_state:
                    optimizer.state[parameter] = _clone(self.start.optimizer_state[name])
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        first = self.history.first_step
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: learning_rate_factor(first + step, self.settings),
        )
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.history.batch_digests.append(hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.history.train_loss.append(loss.item())
        return loss


class _Watch(TrainerCallback):
    """Progress bar, held-out loss, and a call at the half-way step."""

    def __init__(self, name: str, settings: Settings, history: History, held_out: torch.Tensor, at_half_way):
        self.name, self.settings, self.history = name, settings, history
        self.held_out, self.at_half_way = held_out, at_half_way

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=f"train {self.name}", unit="step")
        self._evaluate(0, model)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = self.history.first_step + state.global_step
        if self.at_half_way is not None and step == self.settings.half_way_step:
            self.at_half_way(model, _optimizer_state(model, optimizer))
        if step % self.settings.eval_every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step, model)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _evaluate(self, steps_done: int, model: PreTrainedModel):
        started = time.perf_counter()
        self.history.held_out_steps.append(self.history.first_step + steps_done)
        self.history.held_out_loss.append(held_out_loss(model, self.held_out, self.settings.eval_batch_size))
        self.history.seconds -= time.perf_counter() - started  # measuring is not training
        self.bar.set_postfix_str(f"held-out loss {self.history.held_out_loss[-1]:.3f}")


def train_arm(
    name: str,
    model: PreTrainedModel,
    sequences: torch.Tensor,
    held_out: torch.Tensor,
    settings: Settings,
    folder: Path,
    start: HalfWay | None = None,
    at_half_way=None,
) -> History:
    """Trains `model` in place to the end of the budget.

    Args:
        name: of the model, for the progress bar.
        sequences: those of the whole budget `[steps * batch_size, T]`, in the order of training.
        held_out: `[N, T]`, for the held-out loss every `eval_every` steps.
        folder: for the Trainer's own use.
        start: where to go on; default: the beginning.
        at_half_way: called with the model and its optimizer state after `half_way_step` steps.
    """
    history = History(first_step=0 if start is None else start.step)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps - history.first_step,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = _ArmTrainer(
        model=model,
        args=arguments,
        train_dataset=Sequences(sequences[history.first_step * settings.batch_size :]),
        callbacks=[_Watch(name, settings, history, held_out, at_half_way)],
        settings=settings,
        start=start,
        history=history,
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    history.seconds += time.perf_counter() - started
    model.eval()
    return history


def _optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> OptimizerState:
    return {name: _clone(optimizer.state[parameter]) for name, parameter in model.named_parameters()}


def _clone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}
