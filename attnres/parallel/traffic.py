"""Traffic between pipeline stages: the sources every stage sends and receives, and the paper's formulas.

Symbols: P ranks, V virtual stages each, C = P V stages, stage c on rank c mod P; D hidden size; N_p blocks per rank and
virtual stage. Source 0 is the embedding.
"""

from dataclasses import dataclass, field

from ..configuration_attnres import AttnResConfig


@dataclass(frozen=True)
class Route:
    """What one stage does with sources, all given by their indices in the order of depth.

    Attributes:
        layers: decoder layers of the stage.
        fetched: taken from the store of its rank, whose earlier stages have them.
        received: from the previous stage, in this order; then, if `partial_received`, a partial sum.
        completed: become complete here.
        sent: to the next stage, in this order; then, if `partial_sent`, a partial sum.
        later_readers: stages of the same rank that come after this one and read what this one stores.

    In `"standard"` mode there are no sources: the hidden states are all that crosses, as the partial sum.
    """

    layers: range
    fetched: range
    received: range
    partial_received: bool
    completed: range
    sent: range
    partial_sent: bool
    later_readers: int


def plan_routes(config: AttnResConfig, bounds: list[int], ranks: int, caching: bool) -> list[Route]:
    """The route of every stage.

    With caching a stage receives the sources that were completed since the previous stage of its rank ended, and takes
    older ones from the store; without, all complete sources cross every time.

    Args:
        config: of the whole model.
        bounds: C + 1 numbers; stage c has the decoder layers from bounds[c] up to bounds[c + 1].
        ranks: P.
        caching: whether stages of a rank share a store.
    """
    stages = len(bounds) - 1
    mode, per_block = config.residual_mode, config.layers_per_block
    complete = [0]  # sources complete before stage c
    for end in bounds[1:]:
        blocks = end // per_block if end < config.num_hidden_layers else config.num_blocks
        complete.append({"standard": 0, "full": 1 + 2 * end, "block": 1 + blocks}[mode])

    def known(stage: int) -> int:
        """Sources that the rank of a stage has from its earlier stages."""
        return complete[stage - ranks + 1] if caching and stage >= ranks else 0

    def goes_on(stage: int) -> bool:
        """Whether a partial sum crosses from a stage to the next."""
        end = bounds[stage + 1]
        return end < config.num_hidden_layers and (mode == "standard" or (mode == "block" and end % per_block > 0))

    return [
        Route(
            layers=range(bounds[stage], bounds[stage + 1]),
            fetched=range(known(stage)),
            received=range(known(stage), complete[stage]),
            partial_received=stage > 0 and goes_on(stage - 1),
            completed=range(complete[stage], complete[stage + 1]),
            sent=range(known(stage + 1), complete[stage + 1]) if stage + 1 < stages else range(0),
            partial_sent=goes_on(stage),
            later_readers=len(range(stage + ranks, stages, ranks)) if caching else 0,
        )
        for stage in range(stages)
    ]


def split_layers(layers: int, stages: int, given: list[int] | None = None) -> list[int]:
    """C + 1 bounds of the stages' decoder layers: as given, or as even as they can be, the longer stages first.

    Raises:
        ValueError: fewer decoder layers than stages, or a split that does not fit.
    """
    if layers < stages:
        raise ValueError(
            f"num_hidden_layers={layers} are fewer than the {stages} stages (ranks times virtual_stages): every stage "
            "needs at least one decoder layer. Take fewer ranks or virtual stages."
        )
    if given is None:
        given = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in given)
    if not whole or len(given) != stages or sum(given) != layers:
        raise ValueError(
            f"split must be {stages} numbers of decoder layers, one of at least 1 per stage, that sum to "
            f"num_hidden_layers={layers}, got {list(given)}."
        )
    bounds = [0]
    for count in given:
        bounds.append(bounds[-1] + count)
    return bounds


def naive_blocks(ranks: int, virtual_stages: int, blocks_per_stage: float) -> float:
    """The paper's C (C - 1) / 2 N_p: blocks per token that cross without caching, over all stages."""
    stages = ranks * virtual_stages
    return stages * (stages - 1) / 2 * blocks_per_stage


def cached_blocks(ranks: int, virtual_stages: int, blocks_per_stage: float) -> float:
    """The paper's P (P - 1) / 2 N_p + (V - 1) P^2 N_p: blocks per token that cross with cross-stage caching."""
    return (ranks * (ranks - 1) / 2 + (virtual_stages - 1) * ranks**2) * blocks_per_stage


@dataclass
class Traffic:
    """Bytes of the tensors that one rank really sent, since the last `reset`.

    Attributes:
        forward: of sources and partial sums to next stages; `forward_sources` without the partial sums.
        backward: of their gradients to previous stages.
        crossings: how often each source was sent to each stage, by (micro-batch, source, receiving stage).
    """

    forward: int = 0
    forward_sources: int = 0
    backward: int = 0
    crossings: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def reset(self):
        self.forward = self.forward_sources = self.backward = 0
        self.crossings.clear()
