"""Bytes per device: parameters, and what a training step or a prefill keeps besides them."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from .plan_layout import Layout
from .plan_model import DEPTH_MIXER, EMBEDDING, HEAD, NORM, ParameterPlan, PlannedModel, local_shape, parallel_styles
from .plan_trace import Storages, Trace, trace_cache, trace_training

FLOAT32 = 4
OPTIMIZERS = ("adamw", "muon")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Work:
    """What a step does on every replica.

    Attributes:
        tokens: length of a sequence.
        batch: sequences per micro-batch.
        micro_batches: per step and replica.
        dtype: "bfloat16": mixed precision as accelerate does it, in a prefill the weights themselves; or "float32".
        optimizer: "adamw" or "muon".
        checkpointing: decoder layers keep their inputs and are run again in the backward pass.
    """

    tokens: int
    batch: int = 1
    micro_batches: int = 1
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    checkpointing: bool = False

    @property
    def mixed(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def computed_in(self) -> int:
        """Bytes per element of what FSDP2 gathers, reduces and hands to a decoder layer."""
        return 2 if self.mixed else FLOAT32


@dataclass(frozen=True)
class Held:
    """A parameter, or the part of it, that one device works with.

    Attributes:
        plan: the whole parameter.
        shape: here, after tensor, expert and pipeline parallelism.
        replicas: ranks with the same.
    """

    plan: ParameterPlan
    shape: tuple[int, ...]
    replicas: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def sharded(self) -> int:
        """Elements under FSDP2 on the rank with the most: it divides the first dimension."""
        return -(-self.shape[0] // self.replicas) * math.prod(self.shape[1:])


class Plan:
    """A model in a layout at work.

    Args:
        model, layout, work: see there.
        traces: of earlier plans for the same model, by what they depend on; added to.
    """

    def __init__(self, model: PlannedModel, layout: Layout, work: Work, traces: dict | None = None):
        self.model, self.layout, self.work = model, layout, work
        self.traces = {} if traces is None else traces
        self.bounds = layout.bounds(model.config.num_hidden_layers)
        self.styles = parallel_styles(model.module, layout.tensor, layout.expert)

    @property
    def zero3(self) -> bool:
        return self.layout.shard == "zero3" and self.layout.data > 1

    @cached_property
    def trace(self) -> Trace:
        """Of one micro-batch. FSDP2 gives out bfloat16 parameters; without it autocast copies float32 ones."""
        work, layout = self.work, self.layout
        dtype = torch.bfloat16 if work.mixed and self.zero3 else torch.float32
        key = (work.batch, work.tokens, layout.tensor, layout.expert, dtype, work.mixed)
        if key not in self.traces:
            self.traces[key] = trace_training(self.model.module, *key)
        return self.traces[key]

    def layers(self, rank: int) -> list[range]:
        """Decoder layers of every stage of a pipeline rank."""
        return [range(self.bounds[stage], self.bounds[stage + 1]) for stage in self.layout.stages_of(rank)]

    def parameters(self, rank: int) -> list[Held]:
        """Of a pipeline rank, which has the slices of the depth mixer that belong to its decoder layers."""
        own = [layer for stage in self.layers(rank) for layer in stage]
        first, last = rank == 0, rank == self.layout.pipeline - 1
        tied = self.model.tied
        held = []
        for each in self.model.parameters:
            shape = local_shape(
                each.name, each.shape, self.styles.get(each.name), self.layout.tensor, self.layout.expert
            )
            if each.owner == DEPTH_MIXER and "output_norm" not in each.name:
                shape = (len(own), *shape[1:])
            elif not (
                each.owner in own
                or (each.owner == EMBEDDING and (first or (tied and last)))
                or (each.owner in (NORM, HEAD, DEPTH_MIXER) and last)
            ):
                continue
            expert = each.routed and self.layout.expert > 1
            held.append(Held(each, shape, self.layout.expert_replicas if expert else self.layout.data))
        return held

    def training(self, rank: int) -> dict[str, int]:
        """Bytes on a device of a pipeline rank at the peak of a training step."""
        held, work = self.parameters(rank), self.work
        kept = sum(each.sharded if self.zero3 else each.elements for each in held)
        whole = sum(each.elements for each in held)
        items = {
            "parameters": kept * FLOAT32,
            "gradients": kept * FLOAT32,
            "optimizer state": sum(self._state(each) for each in held),
        }
        if self.zero3:
            items["gathered by FSDP2"] = self._gathered(held)
            if work.micro_batches > 1:
                items["gradients between micro-batches"] = whole * work.computed_in
        elif self.layout.data > 1 and self.layout.pipeline == 1:
            items["buckets of DDP"] = whole * FLOAT32
        copies = self._copies(rank)
        if copies:
            items["casts of weights"] = copies
        streams, rest = self._kept(rank)
        items["block representations" if self.model.module.depth_mixer is not None else "hidden states"] = streams
        items["activations"] = rest
        if rank == self.layout.pipeline - 1:
            # The loss works in float32: the gradient of its logarithms, and that of the logits.
            items["logits"] = sum(self.trace.outside.get(HEAD, {}).values()) + 2 * FLOAT32 * self.trace.logits
        return items

    def _state(self, each: Held) -> int:
        moments = 1 if self.work.optimizer == "muon" and each.plan.matrix else 2
        return moments * FLOAT32 * (each.sharded if self.zero3 else each.elements)

    def units(self, held: list[Held]) -> dict[int | str, list[Held]]:
        """What FSDP2 gathers together: decoder layers, the embedding, final norm with head, and the rest."""
        units = {}
        for each in held:
            owner = each.plan.owner
            owner = HEAD if owner == NORM or (owner == EMBEDDING and self.model.tied) else owner
            units.setdefault(owner, []).append(each)
        return units

    def _gathered(self, held: list[Held]) -> int:
        """Two decoder layers whole, as the next is gathered while one works, the gradients of one, whole and packed
        to be reduced, and what stays whole until the end of the step: final norm, head and depth mixer."""
        sizes = {owner: sum(each.elements for each in unit) for owner, unit in self.units(held).items()}
        layer = max((size for owner, size in sizes.items() if isinstance(owner, int)), default=0)
        last = sizes.get(HEAD, 0) + sizes.get(DEPTH_MIXER, 0)
        return (4 * layer + last) * self.work.computed_in

    def _copies(self, rank: int) -> int:
        owners = {layer for stage in self.layers(rank) for layer in stage}
        owners |= {EMBEDDING} if rank == 0 else set()
        owners |= {NORM, HEAD} if rank == self.layout.pipeline - 1 else set()
        return sum(sum(kept.values()) for owner, kept in self.trace.copies.items() if owner in owners)

    def _kept(self, rank: int) -> tuple[int, int]:
        """Of all micro-batches in flight: block representations and partial sums, and what else decoder layers keep."""
        stages = self.layers(rank)
        first, last = rank == 0, rank == self.layout.pipeline - 1
        streams, rest = [], []  # per micro-batch that is in the first stages of this rank
        largest = 0
        for count in range(1, len(stages) + 1):
            kept, again = self._union(stages[:count], first, last and count == len(stages))
            largest = max(largest, again)
            streams.append(sum(size for key, size in kept.items() if key in self.trace.streams))
            rest.append(sum(size for key, size in kept.items() if key not in self.trace.streams))
        live = max(
            in_flight(rank, self.layout.pipeline, self.layout.virtual_stages, self.work.micro_batches),
            key=lambda counts: sum((streams[n] + rest[n]) * times for n, times in enumerate(counts)),
        )
        return (
            sum(streams[n] * times for n, times in enumerate(live)),
            sum(rest[n] * times for n, times in enumerate(live)) + largest,
        )

    def _union(self, stages: list[range], first: bool, last: bool) -> tuple[Storages, int]:
        """Of one micro-batch; and, with checkpointing, what the decoder layer that is run again keeps meanwhile."""
        trace, kept, again = self.trace, {}, 0
        if first:
            kept |= trace.outside.get(EMBEDDING, {})
        for layer in (layer for stage in stages for layer in stage):
            kept |= trace.inputs[layer] if self.work.checkpointing else trace.inside.get(layer, {})
            kept |= trace.outside.get(layer, {})
        if last:
            kept |= trace.outside.get(NORM, {})
        if self.work.checkpointing:
            for layer in (layer for stage in stages for layer in stage):
                again = max(again, sum(size for key, size in trace.inside[layer].items() if key not in kept))
        return kept, again


def in_flight(rank: int, ranks: int, virtual_stages: int, micro_batches: int) -> list[list[int]]:
    """How many micro-batches are in how many stages of a rank, at every step of (interleaved) 1F1B.

    Returns:
        Lists of V numbers: entry v counts the micro-batches whose forward pass has run in the first v + 1 stages of the
        rank and whose backward pass has not.
    """
    if ranks == 1:
        return [[1]]
    rounds = max(1, micro_batches // ranks)
    per_round = micro_batches // rounds
    total = micro_batches * virtual_stages
    factor = 2 if virtual_stages > 1 else 1
    warmup = min((virtual_stages - 1) * per_round + factor * (ranks - 1 - rank), total)
    live, found = [0] * virtual_stages, []

    def forward(step: int):
        stage = step // per_round % virtual_stages
        live[stage] += 1
        if stage:
            live[stage - 1] -= 1
        found.append(list(live))

    def backward(step: int):
        stage = virtual_stages - 1 - step // per_round % virtual_stages
        live[stage] -= 1
        if stage:
            live[stage - 1] += 1

    for step in range(warmup):
        forward(step)
    for step in range(total - warmup):
        forward(warmup + step)
        backward(step)
    return found


@dataclass(frozen=True)
class Prefill:
    """A prefill of `work.tokens` tokens.

    Attributes:
        chunk: tokens at a time; None: all at once.
        sequence_shards: whether tensor-parallel ranks each keep block representations of a part of the sequence.
    """

    chunk: int | None = None
    sequence_shards: bool = False


def block_bytes(sources: int, tokens: int, hidden_size: int, itemsize: int, shards: int = 1) -> int:
    """Block representations on one device, the paper's N T D (section 4.2) over P sequence shards."""
    return sources * -(-tokens // shards) * hidden_size * itemsize


def sources_of(model: PlannedModel) -> int:
    """Sources that a forward pass keeps: the embedding, and the blocks or all sublayer outputs."""
    config = model.config
    return {"standard": 0, "full": 1 + config.num_sublayers, "block": 1 + config.num_blocks}[config.residual_mode]


def prefill_memory(plan: Plan, prefill: Prefill) -> tuple[dict[str, int], list]:
    """Bytes on a device at the peak of a prefill, and the collectives of one chunk."""
    work, layout, config = plan.work, plan.layout, plan.model.config
    dtype = DTYPES[work.dtype]
    at_once = min(prefill.chunk or work.tokens, work.tokens)
    shards = layout.tensor if prefill.sequence_shards else 1
    cache, _ = trace_cache(plan.model.module, work.batch, work.tokens, layout.tensor, layout.expert, dtype)
    _, collectives = trace_cache(plan.model.module, work.batch, at_once, layout.tensor, layout.expert, dtype)
    trace = trace_training(plan.model.module, work.batch, at_once, layout.tensor, layout.expert, dtype)
    sources, tokens = sources_of(plan.model), work.batch * at_once
    layer = max(sum(size for key, size in kept.items() if key not in trace.streams) for kept in trace.inside.values())
    return {
        "parameters": sum(each.elements for each in plan.parameters(0)) * dtype.itemsize,
        "cache": cache,
        "block representations": block_bytes(sources, tokens, config.hidden_size, dtype.itemsize, shards),
        "depth logits": sources * -(-tokens // shards) * (config.num_sublayers + 1) * FLOAT32 if sources else 0,
        "one decoder layer": layer,
        "logits": work.batch * config.vocab_size * dtype.itemsize,
    }, collectives
