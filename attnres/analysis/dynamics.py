"""Measures training dynamics over depth during the steps of a Trainer (paper, section on training dynamics).

Shapes: B batch, T tokens, D hidden size, L decoder layers, n sources.
"""

import sys
from collections import defaultdict
from functools import partial

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .dynamics_runs import ENTROPY, GRADIENT_NORM, OUTPUT_RMS, QUERY_NORM, layer_name, mixture_names

logger = logging.get_logger(__name__)

DEFAULT_INTERVAL = 100


class DepthDynamicsCallback(TrainerCallback):
    """Logs magnitudes, gradients, pseudo-queries and depth weights of every decoder layer while a `Trainer` trains.

        Trainer(..., callbacks=[DepthDynamicsCallback()])

    Measures the steps that are multiples of `interval` and the last one, and hands the values to `Trainer.log`, so
    that every reporter of the Trainer receives them. x is what a decoder layer returns: the hidden states (plain
    residuals), the partial sum of the block including the layer ("block"), or the output of its MLP ("full").

        depth/output_rms/layer_i       sqrt(mean(x^2)) over all tokens of the step (padding included) and D
        depth/gradient_norm/layer_i    |d loss / d x| over all tokens of the step; before clipping, without the
                                       factor of a float16 GradScaler
        depth/query_norm/layer_i_attention, ..._mlp, depth/query_norm/output    |w| of the pseudo-query
        depth/entropy/layer_i_attention, ..._mlp, depth/entropy/output          -sum_i a_i ln a_i in nats, mean over
                                       tokens: 0 if one source takes all, ln n if all n take the same

    The last two are logged only where depth is mixed: models with plain residuals (`residual_mode="standard"` and any
    transformers decoder) have the first two. A layer that no gradient reaches has no gradient norm. With gradient
    accumulation, all batches of the step count. With several processes, each measures its own share of the batch and
    the values of rank 0 are logged. Hooks cannot see layers compiled by torch.compile, or copied by DataParallel: the
    callback then warns once and logs nothing.

    Args:
        interval: number of optimiser steps from one measurement to the next.

    Raises:
        ValueError: `interval` is not a positive whole number; or, when training begins, the model has no decoder
            layers or no Trainer is calling.
    """

    def __init__(self, interval: int = DEFAULT_INTERVAL):
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, in optimiser steps, got {interval!r}.")
        self.interval = interval
        self._trainer: Trainer | None = None
        self._decoder: nn.Module | None = None
        self._step: _MeasuredStep | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._reset()  # an interrupted training leaves its hooks behind
        self._decoder = _decoder_of(model)
        self._trainer = _calling_trainer()
        compiled = args.torch_compile or any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
        )
        if compiled:
            self._give_up("torch.compile hides what the decoder layers return")
        elif args.n_gpu > 1:
            self._give_up("DataParallel runs copies of the decoder layers; use one process per GPU (torchrun)")

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if self._decoder is not None and (step % self.interval == 0 or step == state.max_steps):
            # Read now, because the scaler changes its factor after the backward pass.
            scaler = getattr(self._trainer.accelerator, "scaler", None)
            self._step = _MeasuredStep(self._decoder, 1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self, args, state, control, **kwargs):
        if self._step is None:
            return
        measured, self._step = self._step, None
        measured.remove_hooks()
        values = measured.values()
        if not values:
            self._give_up("no decoder layer was called as a module")
            return
        should_log = control.should_log
        self._trainer.log(values)
        control.should_log = should_log  # logging clears it, but the loss of this step may still have to be logged

    def on_train_end(self, args, state, control, **kwargs):
        self._reset()

    def _give_up(self, reason: str):
        logger.warning(f"DepthDynamicsCallback logs nothing: {reason}.")
        self._reset()

    def _reset(self):
        if self._step is not None:
            self._step.remove_hooks()
        self._step = self._decoder = self._trainer = None


class _MeasuredStep:
    """Observes a decoder for one optimiser step. All values stay on their device until `values`, so no GPU waits."""

    def __init__(self, decoder: nn.Module, loss_scale: float):
        self.loss_scale = loss_scale  # factor of the loss in the backward pass
        self.num_layers = len(decoder.layers)
        self.mixer = getattr(decoder, "depth_mixer", None)
        self.is_full = getattr(getattr(decoder, "config", None), "residual_mode", None) == "full"
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
            # A sharded module holds all of its parameters only inside its own forward pass.
            self._handles += [
                module.register_forward_hook(partial(self._see_queries, name.rpartition(".")[2]))
                for name, module in self.mixer.named_modules()
                if name.endswith(("attention_norm", "mlp_norm", "output_norm"))
            ]

    def remove_hooks(self):
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Returns the values to log, copied to the CPU all at once; empty if no layer was called."""
        found: dict[str, torch.Tensor] = {}
        for layer, norms in sorted(self._outputs.items()):
            norm = torch.linalg.vector_norm(torch.stack(norms))
            found[layer_name(OUTPUT_RMS, layer, self.num_layers)] = norm / self._sizes[layer] ** 0.5
        for layer, norms in sorted(self._gradients.items()):
            norm = torch.linalg.vector_norm(torch.stack(norms))
            found[layer_name(GRADIENT_NORM, layer, self.num_layers)] = norm / self.loss_scale
        if len(self._queries) == 3:
            layers = torch.stack([self._queries["attention_norm"], self._queries["mlp_norm"]], dim=1)
            query_norms = torch.cat([layers.flatten(), self._queries["output_norm"]])
            found.update(zip(mixture_names(QUERY_NORM, self.num_layers), query_norms, strict=True))
        if self._entropies:
            shares = torch.tensor(self._tokens, dtype=self._entropies[0].dtype) / sum(self._tokens)
            mean = torch.stack(self._entropies, dim=-1) @ shares.to(self._entropies[0].device)
            found.update(zip(mixture_names(ENTROPY, self.num_layers), mean, strict=True))
        if not found:
            return {}
        device = next(iter(found.values())).device  # a model may be spread over several devices
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
            output = output[-1] if self.is_full else output[0]
        if self._training_pass:  # activation checkpointing runs a layer twice, which leaves the mean as it is
            self._sizes[index] += output.numel()
            self._outputs[index].append(_norm(output.detach()))
        if output.requires_grad:
            output.register_hook(lambda gradient: self._gradients[index].append(_norm(gradient.detach())))

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


def _decoder_of(model: nn.Module) -> nn.Module:
    """Returns the module that holds the decoder layers as `layers`, inside adapters and other wrappers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in decoder.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and len(module.layers) > 0:
            return module
    raise ValueError(
        f"DepthDynamicsCallback finds no decoder layers in {type(model).__name__}, which has no module list named "
        "`layers`; leave the callback out for this model."
    )


def _calling_trainer() -> Trainer:
    """Returns the Trainer up the call stack: Trainer does not pass itself to callbacks, and only it can log."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise ValueError("DepthDynamicsCallback logs through a Trainer; pass it as Trainer(callbacks=[...]).")
