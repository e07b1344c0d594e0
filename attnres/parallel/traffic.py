"""Plans which sources each pipeline stage sends and receives, and counts what a rank has sent.

Symbols: P ranks, V virtual stages each, C = P V stages, stage c on rank c mod P. Source 0 is the embedding.
"""

from collections import Counter
from dataclasses import dataclass, field

from ..configuration_attnres import AttnResConfig


@dataclass(frozen=True)
class Route:
    """The decoder layers of one stage and the sources that it handles, by their indices in the order of depth.

    In `"standard"` mode there are no sources: only the hidden states cross, as the partial sum.
    """

    layers: range  # decoder layers of the stage
    fetched: range  # sources taken from the rank's store, where earlier stages of the rank have put them
    received: range  # sources that the previous stage sends, in this order; then the partial sum, if it crosses
    partial_received: bool
    completed: range  # sources that become complete in this stage
    sent: range  # sources for the next stage, in this order; then the partial sum, if it crosses
    partial_sent: bool
    later_readers: int  # later stages of the same rank, which read the sources that this stage stores


def plan_routes(config: AttnResConfig, bounds: list[int], ranks: int, caching: bool) -> list[Route]:
    """Returns the route of every stage.

    With caching, a stage receives the sources that were completed since the previous stage of its rank ended and takes
    older ones from the store. Without caching, all complete sources cross every time.

    Stage c has the decoder layers from bounds[c] up to bounds[c + 1]; `ranks` is P.
    """
    stages = len(bounds) - 1
    mode, per_block = config.residual_mode, config.layers_per_block
    complete = [0]  # number of sources that are complete before stage c
    for end in bounds[1:]:
        blocks = end // per_block if end < config.num_hidden_layers else config.num_blocks
        complete.append({"standard": 0, "full": 1 + 2 * end, "block": 1 + blocks}[mode])

    def known(stage: int) -> int:
        """Returns how many sources the rank of a stage has from its earlier stages."""
        return complete[stage - ranks + 1] if caching and stage >= ranks else 0

    def sends_partial(stage: int) -> bool:
        end = bounds[stage + 1]
        return end < config.num_hidden_layers and (mode == "standard" or (mode == "block" and end % per_block > 0))

    return [
        Route(
            layers=range(bounds[stage], bounds[stage + 1]),
            fetched=range(known(stage)),
            received=range(known(stage), complete[stage]),
            partial_received=stage > 0 and sends_partial(stage - 1),
            completed=range(complete[stage], complete[stage + 1]),
            sent=range(known(stage + 1), complete[stage + 1]) if stage + 1 < stages else range(0),
            partial_sent=sends_partial(stage),
            later_readers=len(range(stage + ranks, stages, ranks)) if caching else 0,
        )
        for stage in range(stages)
    ]


def split_layers(layers: int, stages: int, given: list[int] | None = None) -> list[int]:
    """Returns the C + 1 bounds of the stages' decoder layers: as given, or as even as possible, longer stages first."""
    if layers < stages:
        raise ValueError(
            f"num_hidden_layers={layers} are fewer than the {stages} stages (ranks times virtual_stages), and each "
            "needs at least one; use fewer ranks or virtual stages."
        )
    if given is None:
        given = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    if len(given) != stages or sum(given) != layers or not all(type(count) is int and count >= 1 for count in given):
        raise ValueError(
            f"split must be {stages} numbers of decoder layers, each at least 1, with the sum "
            f"num_hidden_layers={layers}, got {list(given)}."
        )
    return [sum(given[:stage]) for stage in range(stages + 1)]


@dataclass
class Traffic:
    """Counts the bytes of the tensors that one rank has sent."""

    forward: int = 0  # sources and partial sums sent to next stages
    forward_sources: int = 0  # the same without the partial sums
    backward: int = 0  # gradients sent to previous stages
    # How often each source was sent to each stage, by (micro-batch, source, receiving stage).
    crossings: Counter[tuple[int, int, int]] = field(default_factory=Counter)
