"""A Trainer that writes checkpoints atomically and stops when a run diverges."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from .optimizer import muon_with_adamw
from .run_folder import UNFINISHED, last_checkpoint, name_checkpoint

DECAY_SHARE = 0.2  # share of the steps in which the wsd schedule decays


class Stopped(RuntimeError):
    """A run ended before its last step, for example because a loss, a gradient or weights are not finite."""


class _Finished(Exception):
    """A run was resumed from its last step, so that there is nothing left to train."""


class RunTrainer(Trainer):
    """`Trainer` with atomic checkpoints, a stop at divergence, Muon, and a learning rate for the depth mixer.

    A checkpoint is renamed to its final name when it is complete. When a loss or a gradient is not finite in any
    process, all processes stop before the optimizer step, and weights that are not finite are never saved. Evaluation
    does not change the state of the random number generators.

    Args:
        muon: train the backbone's matrices with Muon.
        depth_learning_rate: peak learning rate of the depth mixer (default: that of all other parameters).
        begin: called on rank 0 when training begins, after all checks.
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
        self.add_callback(_Log() if self.args.disable_tqdm else _LogAndBar())
        self.add_callback(_RunCallback(begin))

    def train(self, *args, **kwargs):
        try:
            super().train(*args, **kwargs)
        except _Finished:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.state.global_step < self.state.max_steps:
            raise Stopped(f"step {self.state.global_step} of {self.state.max_steps} was the last; {self._last_good()}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        optimizer = self._create_muon(model) if self.muon else super().create_optimizer(model)
        if self.depth_learning_rate is not None:
            depth = {id(parameter) for name, parameter in model.named_parameters() if "depth_mixer." in name}
            for group in list(optimizer.param_groups):
                inside = [parameter for parameter in group["params"] if id(parameter) in depth]
                if inside:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in depth]
                    optimizer.add_param_group({**group, "params": inside, "lr": self.depth_learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _create_muon(self, model: nn.Module) -> torch.optim.Optimizer:
        flattened = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1
        if flattened or self.is_deepspeed_enabled:
            raise ValueError(
                "--optimizer muon needs whole matrices, which FSDP 1 and DeepSpeed flatten; use FSDP 2 "
                "(fsdp_version: 2), DDP or --optimizer adamw"
            )
        self.optimizer = muon_with_adamw(model, set(self.get_decay_parameter_names(model)), self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        given = self.args.lr_scheduler_kwargs or {}
        decay_steps = max(1, round(DECAY_SHARE * num_training_steps))
        defaults = {
            "cosine_with_min_lr": {} if "min_lr" in given else {"min_lr_rate": 0.1},
            "warmup_stable_decay": {"num_decay_steps": decay_steps, "decay_type": "linear"},
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
        """Stops if a loss or the gradient is not finite; Trainer calls this once before each optimizer step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss, self._not_finite = self._not_finite, None
        bad = torch.zeros(2, device=self.args.device)
        if loss is not None:
            bad[0] = loss.to(bad)
        # With loss scaling, a step whose gradients overflow is skipped and the scale is lowered.
        scaled = getattr(self.accelerator, "scaler", None) is not None or self.is_deepspeed_enabled
        if grad_norm is not None and not scaled:
            norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
            bad[1] = ~torch.isfinite(norm)
        bad_loss, bad_gradient = self.accelerator.reduce(bad, "sum").tolist()
        if bad_loss or bad_gradient:
            self._stop("the loss is" if bad_loss else "a gradient is", self.state.global_step + 1)
        return grad_norm

    def _stop(self, what: str, step: int):
        raise Stopped(f"step {step}: {what} NaN or infinite; {self._last_good()}")

    def _last_good(self) -> str:
        last = last_checkpoint(Path(self.args.output_dir))
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

    def evaluate(self, *args, **kwargs):
        with torch.random.fork_rng():  # the data loader draws a seed, which must not change the training
            metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            self._stop("the loss on the held-out data is", self.state.global_step)
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
        # Trainer saves FSDP shards without the configuration that `attnres convert` needs to join them.
        if self.is_fsdp_enabled and self.args.should_save:
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def save_whole_model(self, folder: Path):
        """Saves the model in one piece, also if it is sharded; every process must call this."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(folder), _internal_call=True)  # does not push to the hub before the folder is complete

    def check_weights(self):
        """Stops if weights are not finite; a step with finite gradients can still overflow them.

        Raises:
            Stopped: weights are not finite in any process.
        """
        bad = torch.zeros(1, device=self.args.device)
        for tensor in self.model.parameters():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            bad += ~torch.isfinite(local.detach()).all().to(bad.device)
        if self.accelerator.reduce(bad, "sum").item():
            self._stop("weights are", self.state.global_step)


class _RunCallback(TrainerCallback):
    """Calls `begin` when training begins, and logs before each checkpoint and evaluation."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.begin()
        if state.global_step >= state.max_steps:  # Trainer would train one more step before it compares them
            raise _Finished

    def on_step_end(self, args, state, control, **kwargs):
        # A checkpoint does not hold the mean loss since the last log, so a resumed run could not log the same.
        control.should_log |= control.should_save or control.should_evaluate
        return control

    on_epoch_end = on_step_end


class _Log(TrainerCallback):
    """Prints the logs to stderr, without speeds and without the dynamics over depth."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        hidden = ("total_flos", "runtime", "samples_per_second", "steps_per_second")
        shown = {name: value for name, value in (logs or {}).items() if "/" not in name and not name.endswith(hidden)}
        if state.is_world_process_zero and shown.keys() - {"epoch"}:
            texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values())
            values = ", ".join(map(" ".join, zip(shown, texts, strict=True)))
            tqdm.write(f"step {state.global_step}: {values}", file=sys.stderr)


class _LogAndBar(_Log, ProgressCallback):
    """Shows progress bars in addition."""
