"""Measures what a source is worth to a sublayer: the change of the loss without it. A large weight may have no effect.

Without source k, sublayer l mixes by the weights that are left, renormalised:

    h_l = sum_{i != k} a_i v_i / (1 - a_k)

The control of the same sublayer leaves out one source per token, drawn uniformly at random. The change of the loss
without source k says something about k where it differs from the control.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from ..depth_mixer import PseudoQuery
from ..depth_variants import VARIANTS, Variant, rms_norm
from ..folders import write_text
from .depth_weights import source_names

FORMAT = "attnres-ablation/1"
_MASKED = "masked attnres"


@dataclass
class Ablation:
    """Changes of the loss in nats per token; 2 L + 1 rows: attention, MLP, attention, MLP, ..., output."""

    model: str
    tokens: int  # predicted tokens
    loss: float  # of the unchanged model
    sources: list[str]  # the embedding first
    without: list[list[float | None]]  # per row n changes, without source k each; None for an only source
    control: list[list[float]]  # per row one change per draw; empty for an only source
    weights: list[list[float]]  # per row n mean depth weights

    def save(self, path: str | os.PathLike):
        """Writes the result as JSON, atomically."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def passes(counts: list[int], draws: int) -> int:
    """Returns the number of forward passes of an ablation, given the number of sources of each sublayer."""
    return 1 + sum(count + draws for count in counts if count > 1)


@torch.no_grad()
def ablate(
    model,
    token_ids: torch.Tensor,
    *,
    draws: int = 3,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Ablation:
    """Measures the loss of a model without each source of each sublayer, one at a time.

    Args:
        model: an AttnRes model with a head, in residual_mode "block" or "full" and depth_variant "attnres".
        token_ids: `[B, T]`, T at least 2.
        draws: number of draws of the control per sublayer.
        seed: seed of the control.
        name: name of the model in the result.
        progress: function called with 1 after each forward pass.

    Raises:
        ValueError: the model does not mix over depth or is of another variant, or there are fewer than 2 tokens.
    """
    config = model.config
    name = name or model.name_or_path or type(model).__name__
    mode, variant = getattr(config, "residual_mode", "standard"), getattr(config, "depth_variant", None)
    if mode == "standard" or variant != "attnres":
        raise ValueError(
            f'{name}: an ablation needs residual_mode "block" or "full" and depth_variant "attnres", got {mode!r} and '
            f"{variant!r}."
        )
    if token_ids.shape[-1] < 2:
        raise ValueError(f"{name}: a loss needs at least 2 tokens, got {token_ids.shape[-1]}.")
    token_ids, training = token_ids.to(model.device), model.training
    generator = torch.Generator().manual_seed(seed)

    def loss(sublayer: int = 0, mask: torch.Tensor | None = None) -> float:
        with _without(model, sublayer, mask):
            output = model(token_ids, labels=token_ids, output_router_logits=False, use_cache=False)
        if progress is not None:
            progress(1)
        return output.loss.item()

    model.eval()
    try:
        mixed = model.base_model(token_ids, use_cache=False, output_depth_weights=True).depth_weights
        weights = [each.mean((0, 1)).tolist() for each in mixed]
        whole = loss()
        without: list[list[float | None]] = []
        control: list[list[float]] = []
        for sublayer, count in enumerate(map(len, weights)):
            if count == 1:
                without.append([None])
                control.append([])
                continue
            masks = torch.eye(count, dtype=torch.bool)
            without.append([loss(sublayer, mask) - whole for mask in masks])
            drawn = (torch.randint(count, (*token_ids.shape,), generator=generator) for _ in range(draws))
            control.append([loss(sublayer, masks[each]) - whole for each in drawn])
    finally:
        model.train(training)
    return Ablation(name, token_ids[:, 1:].numel(), whole, source_names(config)[0], without, control, weights)


def _masked(values, query, extra, eps):
    """Attends over the sources without those where `extra` is true."""
    logits = (rms_norm(values, eps) * query).sum(-1)
    if extra is not None:
        logits = logits.masked_fill(extra.to(logits.device), float("-inf"))
    weights = torch.softmax(logits, dim=-1)
    return (weights.unsqueeze(-1) * values).sum(2), weights


@contextmanager
def _without(model, sublayer: int, mask: torch.Tensor | None) -> Iterator[None]:
    """Makes one sublayer leave out the sources where `mask`, `[n]` or `[B, T, n]`, is true inside the block."""

    def leave_out(mixer, inputs, queries: list[PseudoQuery]) -> list[PseudoQuery]:
        return [query._replace(extra=mask) if place == sublayer else query for place, query in enumerate(queries)]

    VARIANTS[_MASKED] = Variant("ablation", _masked)
    handle = model.base_model.depth_mixer.register_forward_hook(leave_out)
    model.config.depth_variant = _MASKED
    try:
        yield
    finally:
        model.config.depth_variant = "attnres"
        handle.remove()
        del VARIANTS[_MASKED]
