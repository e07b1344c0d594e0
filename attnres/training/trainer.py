"""A Trainer that writes checkpoints atomically and stops when a run diverges."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from .optimizer import muon_with_adamw
from .run_folder import UNFINISHED, last_checkpoint, name_checkpoint

# The last part of a run in which the learning rate decays, in the schedule that has to be told.
DECAY_SHARE = 0.2


class Stopped(RuntimeError):
    """A run has ended before its last step; says where it can go on."""


class Diverged(Stopped):
    """A loss, a gradient or weights are not finite."""


class _Finished(Exception):
    """The checkpoint that a run was to be resumed from is its last one; the model has its weights."""


class RunTrainer(Trainer):
    """`Trainer` with five differences.

    A checkpoint is written under another name and renamed when it is complete. Every process stops before the optimizer
    when a loss or a gradient is not finite on any of them, and nothing that is not finite is saved. Evaluation leaves
    the random number generators as they were. With `muon` the backbone's matrices are trained by Muon. The depth mixer
    may have a learning rate of its own.

    Args:
        muon: whether to train the backbone's matrices with Muon.
        depth_learning_rate: peak, of the depth mixer; default: that of all.
        begin: called by rank 0 when everything is made and training begins.
    """

    def __init__(
        self, *args, muon: bool, begin: Callable[[], None], depth_learning_rate: float | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.muon = muon
        self.depth_learning_rate = depth_learning_rate
        self._saving = False
        self._not_finite: torch.Tensor | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress(self.args.disable_tqdm))
        self.add_callback(_LogBeforeSaving())
        self.add_callback(_Begin(begin))

    def train(self, *args, **kwargs):
        try:
            found = super().train(*args, **kwargs)
        except _Finished:
            found = None
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.state.global_step < self.state.max_steps:
            raise Stopped(f"step {self.state.global_step} of {self.state.max_steps} was the last; {self._last_good()}")
        return found

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = self._create_optimizer(model)
        if is_new and self.depth_learning_rate is not None:
            named = (self.model if model is None else model).named_parameters()
            depth = {id(parameter) for name, parameter in named if "depth_mixer." in name}
            for group in list(optimizer.param_groups):
                inside = [parameter for parameter in group["params"] if id(parameter) in depth]
                if inside:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in depth]
                    optimizer.add_param_group({**group, "params": inside, "lr": self.depth_learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _create_optimizer(self, model: nn.Module | None) -> torch.optim.Optimizer:
        if not self.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        flattened = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1
        if flattened or self.is_deepspeed_enabled:
            raise ValueError(
                "--optimizer muon needs matrices, and FSDP 1 and DeepSpeed divide them as long vectors: use FSDP 2 "
                "(fsdp_version: 2), DDP or --optimizer adamw"
            )
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        self.optimizer = muon_with_adamw(model, decayed, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        given = self.args.lr_scheduler_kwargs or {}
        defaults = {
            "cosine_with_min_lr": {} if "min_lr" in given else {"min_lr_rate": 0.1},
            "warmup_stable_decay": {
                "num_decay_steps": max(1, round(DECAY_SHARE * num_training_steps)),
                "decay_type": "linear",
            },
        }
        self.args.lr_scheduler_kwargs = {**defaults.get(self.args.lr_scheduler_type.value, {}), **given}
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise ValueError(f"--lr-scheduler-kwargs {given}: {error}") from error

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            bad = ~torch.isfinite(loss.detach()).all()
            self._not_finite = bad if self._not_finite is None else self._not_finite | bad
        return found

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """Called once per optimizer step, before it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._stop_unless_finite(grad_norm)
        return grad_norm

    def _stop_unless_finite(self, grad_norm):
        loss, self._not_finite = self._not_finite, None
        bad = torch.zeros(2, device=self.args.device)
        if loss is not None:
            bad[0] = loss.to(bad)
        scaled = getattr(self.accelerator, "scaler", None) is not None or self.is_deepspeed_enabled
        if grad_norm is not None and not scaled:  # a scaler leaves out the step and goes on with a smaller factor
            norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
            bad[1] = ~torch.isfinite(norm)
        bad_loss, bad_gradient = self.accelerator.reduce(bad, "sum").tolist()
        if bad_loss or bad_gradient:
            self._diverged("the loss is" if bad_loss else "a gradient is", self.state.global_step + 1)

    def _diverged(self, what: str, step: int):
        raise Diverged(f"step {step}: {what} NaN or infinite; {self._last_good()}")

    def _last_good(self) -> str:
        last = last_checkpoint(Path(self.args.output_dir))
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

    def evaluate(self, *args, **kwargs):
        with torch.random.fork_rng():  # a data loader draws a seed: whether one evaluates must not change the training
            metrics = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if loss - loss != 0:
            self._diverged("the loss on the held-out data is", self.state.global_step)
        return metrics

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial):
        self.check_weights()
        folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        written, final = os.path.join(folder, UNFINISHED, name), os.path.join(folder, name)
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if self.state.best_model_checkpoint == written:
            self.state.best_model_checkpoint = final
            if self.args.should_save:
                self.state.save_to_json(os.path.join(written, "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name_checkpoint(Path(written), Path(folder))
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        # Trainer leaves shards without what says which model they are of: `attnres convert` has to join them.
        if self.is_fsdp_enabled and self.args.should_save and not (folder / "config.json").is_file():
            self.model.config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def save_whole_model(self, folder: Path):
        """In one piece, however it is divided; called by every process."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(folder), _internal_call=True)  # is not to push, which comes when all is in its place

    def check_weights(self):
        """After a step with finite gradients weights may still have left the range of their type."""
        bad = torch.zeros(1, device=self.args.device)
        for tensor in self.model.parameters():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            bad += ~torch.isfinite(local.detach()).all().to(bad.device)
        if self.accelerator.reduce(bad, "sum").item():
            self._diverged("weights are", self.state.global_step)


class _LogBeforeSaving(TrainerCallback):
    """The mean loss since the last log is not part of a checkpoint: it is logged before, so that a resumed run logs the
    same."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or control.should_evaluate
        return control

    on_epoch_end = on_step_end


class _Begin(TrainerCallback):
    """The first thing that is done when training begins. A run at its end does not: Trainer looks after a step only,
    and would do one more."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.begin()
        if state.global_step >= state.max_steps:
            raise _Finished


class _Progress(ProgressCallback):
    """The bar and the logs on stderr, without the many numbers over depth."""

    def __init__(self, disable_bar: bool):
        super().__init__()
        self.disable_bar = disable_bar

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.disable_bar:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.update(state.global_step)
        self.current_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if not self.disable_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: value for name, value in (logs or {}).items() if "/" not in name and name not in _NOT_SHOWN}
        if not state.is_world_process_zero or not shown.keys() - {"epoch"}:
            return
        line = f"step {state.global_step}: " + ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        )
        if self.training_bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.training_bar.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


_NOT_SHOWN = {
    "total_flos",
    *(f"{kind}_{what}" for kind in ("train", "eval") for what in ("runtime", "samples_per_second", "steps_per_second")),
}
