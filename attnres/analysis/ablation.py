"""What a source is worth to a sublayer: the loss without it. A large depth weight is not a large effect.

Without source k, sublayer l mixes by the weights that are left, renormalised:

    h_l = sum_{i != k} a_i v_i / (1 - a_k)

Beside it stands a control of the same sublayer: at every token one source drawn at random is left out, in proportion to
nothing. What leaving out source k costs says something about k where it differs from that.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from ..depth_mixer import PseudoQuery
from ..depth_variants import VARIANTS, Variant, rms_norm
from .depth_weights import _sources, write_text

FORMAT = "attnres-ablation/1"
_MASKED = "masked attnres"


@dataclass
class Ablation:
    """Changes of the loss, in nats per token, by sublayer: attention, MLP, attention, MLP, ..., output.

    Attributes:
        model: name.
        tokens: predicted tokens.
        loss: of the model as it is.
        sources: names of the sources, the embedding first.
        without: 2 L + 1 rows of n changes, where source k is left out; `None` for the only source of a sublayer.
        control: 2 L + 1 rows, one change per draw, where a random source of every token is left out; empty likewise.
        weights: 2 L + 1 rows of n mean depth weights.
    """

    model: str
    tokens: int
    loss: float
    sources: list[str]
    without: list[list[float | None]]
    control: list[list[float]]
    weights: list[list[float]]

    def save(self, path: str | os.PathLike):
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def passes(counts: list[int], draws: int) -> int:
    """How many forward passes an ablation takes, for sublayers of that many sources."""
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
    """The loss of a model without each source of each sublayer, one at a time.

    Args:
        model: an AttnRes model with a head, in residual_mode "block" or "full", depth_variant "attnres".
        token_ids: `[B, T]`, T at least 2.
        draws: of the control, per sublayer.
        seed: of the control.
        name: what the result calls the model.
        progress: called with 1 after each forward pass.

    Raises:
        ValueError: a model without depth mixing, or of another variant.
    """
    config = model.config
    name = name or model.name_or_path or type(model).__name__
    if getattr(config, "residual_mode", "standard") == "standard" or config.depth_variant != "attnres":
        raise ValueError(
            f'{name}: an ablation needs residual_mode "block" or "full" and depth_variant "attnres", got '
            f"{getattr(config, 'residual_mode', 'standard')!r} and {getattr(config, 'depth_variant', None)!r}."
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
        whole, without, control = loss(), [], []
        for sublayer, row in enumerate(weights):
            count = len(row)
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
    return Ablation(name, token_ids[:, 1:].numel(), whole, _sources(config)[0], without, control, weights)


def _masked(sources, query, extra, eps):
    """Attention over the sources that `extra`, true where one is left out, leaves."""
    values = torch.stack(tuple(sources), dim=2).to(query.dtype)
    logits = (rms_norm(values, eps) * query).sum(-1)
    if extra is not None:
        logits = logits.masked_fill(extra.to(logits.device), float("-inf"))
    weights = torch.softmax(logits, dim=-1)
    return (weights.unsqueeze(-1) * values).sum(2), weights


@contextmanager
def _without(model, sublayer: int, mask: torch.Tensor | None) -> Iterator[None]:
    """One sublayer leaves out the sources where `mask`, `[n]` or `[B, T, n]`, is true: for that time the model is of a
    variant of its own."""

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
