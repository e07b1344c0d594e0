"""Training dynamics over depth, measured during the steps of a Trainer (paper, section on training dynamics).

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources.
"""

import sys
from collections import defaultdict
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .dynamics_names import ENTROPY, GRADIENT_NORM, OUTPUT_RMS, QUERY_NORM, layer_name, mixture_names

logger = logging.get_logger(__name__)

DEFAULT_INTERVAL = 100


class DepthDynamicsCallback(TrainerCallback):
    """Logs magnitudes, gradients, pseudo-queries and depth weights of every decoder layer while a `Trainer` trains.

        Trainer(..., callbacks=[DepthDynamicsCallback()])

    Measured in the steps that are multiples of `interval` and in the last one, and logged by `Trainer.log`, so that
    whatever listens to the Trainer receives it. x is what a decoder layer returns: the hidden states (plain residuals),
    the partial sum of the block including the layer ("block"), or the output of its MLP ("full").

        depth/output_rms/layer_i       sqrt(mean(x^2)), over all tokens of the step (padding included) and D
        depth/gradient_norm/layer_i    |d loss / d x|, over all tokens of the step; before clipping, without the
                                       factor of a float16 GradScaler
        depth/query_norm/layer_i_attention, ..._mlp, depth/query_norm/output    |w|, of the pseudo-query
        depth/entropy/layer_i_attention, ..._mlp, depth/entropy/output          -sum_i a_i ln a_i in nats, mean over
                                       tokens: 0 on one source alone, ln n on all n alike

    The last two only where depth is mixed: models with plain residuals (`residual_mode="standard"` and any transformers
    decoder) have the first two. A layer that no gradient reaches has no gradient norm. With gradient accumulation all
    batches of the step count; of several processes each measures its own share, and the first one's is reported.
    Layers compiled by torch.compile cannot be observed: then it says so, once, and logs nothing.

    Args:
        interval: optimiser steps from one measurement to the next.

    Raises:
        ValueError: `interval` is not a positive whole number; or, when training begins, there are no decoder layers.
    """

    def __init__(self, interval: int = DEFAULT_INTERVAL):
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, in optimiser steps, got {interval!r}")
        self.interval = interval
        self._trainer: Trainer | None = None
        self._decoder: nn.Module | None = None
        self._step: _MeasuredStep | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs,
    ):
        self._forget()  # what an interrupted training has left
        self._decoder = _decoder_of(model)
        self._trainer = _calling_trainer()
        obstacle = _obstacle(args, model)
        if obstacle is not None:
            self._give_up(obstacle)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        step = state.global_step + 1
        if self._decoder is not None and (step % self.interval == 0 or step == state.max_steps):
            scaler = getattr(self._trainer.accelerator, "scaler", None)  # changes its factor after the backward pass
            self._step = _MeasuredStep(self._decoder, 1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._step is None:
            return
        measured, self._step = self._step, None
        measured.stop_watching()
        values = measured.values()
        if not values:
            self._give_up("no decoder layer was called as a module")
            return
        should_log = control.should_log
        self._trainer.log(values)
        control.should_log = should_log  # logging has cleared it, and the loss of this step may be still to come

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._forget()

    def _give_up(self, reason: str):
        logger.warning(f"DepthDynamicsCallback: {reason}, so that no depth dynamics are logged.")
        self._forget()

    def _forget(self):
        if self._step is not None:
            self._step.stop_watching()
        self._step = self._decoder = self._trainer = None


class _MeasuredStep:
    """Watches a decoder for one optimiser step. What it sees stays on its device: nothing waits for a GPU.

    Args:
        decoder: the module with the decoder layers.
        loss_scale: what the loss is multiplied by before the backward pass.
    """

    def __init__(self, decoder: nn.Module, loss_scale: float):
        self.loss_scale = loss_scale
        self.num_layers = len(decoder.layers)
        self.mixer = getattr(decoder, "depth_mixer", None)
        self._training_pass = False
        self._sizes: dict[int, int] = defaultdict(int)
        self._outputs: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._gradients: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._entropies: list[torch.Tensor] = []  # [2 L + 1] per forward pass
        self._tokens: list[int] = []
        self._queries: dict[str, torch.Tensor] = {}
        self._handles = [decoder.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]
        self._handles += [
            layer.register_forward_hook(partial(self._see_output, index)) for index, layer in enumerate(decoder.layers)
        ]
        if self.mixer is not None:
            self._handles.append(decoder.register_forward_hook(self._see_depth_weights))
            # In its own forward pass a sharded module holds all of its parameters.
            self._handles += [
                module.register_forward_hook(partial(self._see_queries, name.rpartition(".")[2]))
                for name, module in self.mixer.named_modules()
                if name.endswith(("attention_norm", "mlp_norm", "output_norm"))
            ]

    def stop_watching(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """What is logged; moved to the CPU all at once. Empty if nothing was seen."""
        found: dict[str, torch.Tensor] = {}
        for layer, norms in sorted(self._outputs.items()):
            found[layer_name(OUTPUT_RMS, layer, self.num_layers)] = _together(norms) / self._sizes[layer] ** 0.5
        for layer, norms in sorted(self._gradients.items()):
            found[layer_name(GRADIENT_NORM, layer, self.num_layers)] = _together(norms) / self.loss_scale
        if len(self._queries) == 3:
            layers = torch.stack([self._queries["attention_norm"], self._queries["mlp_norm"]], dim=1)
            norms = torch.cat([layers.flatten(), self._queries["output_norm"]])
            found.update(zip(mixture_names(QUERY_NORM, self.num_layers), norms, strict=True))
        if self._entropies:
            shares = torch.tensor(self._tokens, dtype=self._entropies[0].dtype) / sum(self._tokens)
            mean = torch.stack(self._entropies, dim=-1) @ shares.to(self._entropies[0].device)
            found.update(zip(mixture_names(ENTROPY, self.num_layers), mean, strict=True))
        if not found:
            return {}
        device = next(iter(found.values())).device  # layers may have been spread over devices
        numbers = torch.stack([value.to(device, torch.float32) for value in found.values()])
        return dict(zip(found, numbers.tolist(), strict=True))

    def _begin_pass(self, decoder: nn.Module, args: tuple, kwargs: dict):
        self._training_pass = torch.is_grad_enabled()
        if self.mixer is None or not self._training_pass:
            return None
        return args, {**kwargs, "output_depth_weights": True}

    def _see_output(self, index: int, layer: nn.Module, args: tuple, output):
        if not isinstance(output, torch.Tensor):
            # "full" returns the outputs of attention and MLP; some plain layers return hidden states and more.
            output = output[-1] if getattr(layer, "residual_mode", None) == "full" else output[0]
        if self._training_pass:  # what activation checkpointing runs twice counts twice, and leaves the mean as it is
            self._sizes[index] += output.numel()
            self._outputs[index].append(_norm(output.detach()))
        if output.requires_grad:
            output.register_hook(partial(self._see_gradient, index))

    def _see_gradient(self, index: int, gradient: torch.Tensor):
        self._gradients[index].append(_norm(gradient.detach()))

    @torch.no_grad()
    def _see_depth_weights(self, decoder: nn.Module, args: tuple, output):
        if not self._training_pass:
            return
        weights = output.depth_weights
        device = weights[-1].device
        entropies = [torch.special.entr(each).sum(-1).mean().to(device) for each in weights]
        self._entropies.append(torch.stack(entropies))
        self._tokens.append(weights[-1].shape[:-1].numel())

    @torch.no_grad()
    def _see_queries(self, name: str, scores: nn.Module, args: tuple, output):
        self._queries[name] = torch.linalg.vector_norm(scores.query.float(), dim=-1).flatten()


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _together(norms: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all, from the norms of the parts."""
    return torch.linalg.vector_norm(torch.stack(norms))


def _decoder_of(model: nn.Module) -> nn.Module:
    """The module of a model that holds its decoder layers as `layers`, adapters and other wrappers looked through."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in decoder.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and len(module.layers) > 0:
            return module
    raise ValueError(
        f"DepthDynamicsCallback finds no decoder layers in {type(model).__name__}: it looks for a module list named "
        "`layers`. Leave the callback out for this model."
    )


def _calling_trainer() -> Trainer:
    """The Trainer whose callbacks are being called: it hands them everything but its own `log`."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise ValueError("DepthDynamicsCallback logs through a Trainer: pass it as Trainer(callbacks=[...]).")


def _obstacle(args: TrainingArguments, model: nn.Module) -> str | None:
    """What keeps hooks from seeing the decoder layers, if anything."""
    compiled = args.torch_compile or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        return "torch.compile hides what the decoder layers return"
    if args.n_gpu > 1:
        return "DataParallel runs copies of the decoder layers (one process per GPU can be measured: torchrun)"
    return None
