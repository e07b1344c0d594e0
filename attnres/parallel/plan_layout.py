"""Layouts of ranks: their sizes, their rules, and the candidates when only some sizes are given."""

from collections.abc import Iterator
from dataclasses import dataclass

from .plan_model import PlannedModel, local_shape, parallel_styles
from .traffic import split_layers

SHARDS = ("zero3", "none")
NODE = 8  # devices that are assumed to share fast links: the most for tensor parallelism unless more are asked for


@dataclass(frozen=True)
class Layout:
    """world = data x tensor x pipeline ranks.

    Attributes:
        world: ranks in all.
        data: replicas, each with batches of its own.
        tensor: ranks that share a batch and divide matrices.
        pipeline: ranks that divide decoder layers.
        virtual_stages: stages per pipeline rank.
        expert: ranks that divide the routed experts, whole ones each; among those of tensor and data.
        shard: "zero3", parameters, gradients and optimizer state divided among replicas (FSDP2), or "none".
    """

    world: int
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    expert: int = 1
    shard: str = "none"

    @property
    def expert_replicas(self) -> int:
        """Ranks that have the same experts."""
        return self.data * self.tensor // self.expert if self.expert > 1 else self.data

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual_stages

    def bounds(self, layers: int) -> list[int]:
        """Stage c has the decoder layers from bounds[c] up to bounds[c + 1]."""
        return split_layers(layers, self.stages)

    def stages_of(self, rank: int) -> range:
        """Stages of a pipeline rank."""
        return range(rank, self.stages, self.pipeline)

    def __str__(self) -> str:
        parts = [f"data {self.data}", f"tensor {self.tensor}", f"pipeline {self.pipeline}"]
        parts += [f"virtual stages {self.virtual_stages}"] if self.virtual_stages > 1 else []
        parts += [f"expert {self.expert}"] if self.expert > 1 else []
        return f"{' x '.join(parts[:3])}{''.join(f', {each}' for each in parts[3:])}, shard {self.shard}"


def layouts(
    world: int | None,
    data: int | None,
    tensor: int | None,
    pipeline: int | None,
    virtual_stages: int = 1,
    expert: int = 1,
    shard: str | None = None,
) -> Iterator[Layout]:
    """Every division of the world that has the numbers that were given, the simplest first.

    Simple is: replicas only, then FSDP2, then tensor parallelism within a node, then pipeline stages.

    Raises:
        ValueError: the numbers given make no such world.
    """
    given = {"data": data, "tensor": tensor, "pipeline": pipeline}
    product = 1
    for value in given.values():
        product *= value or 1
    world = product if world is None else world
    missing = [name for name, value in given.items() if value is None]
    if (not missing and product != world) or world % product:
        shown = " x ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise ValueError(
            f"world={world} is not {shown} = {product}: data, tensor and pipeline ranks multiply to the world. "
            "Change one of them, or leave one out to have it worked out."
        )
    found = []
    for stages in [pipeline] if pipeline else _divisors(world):
        for ranks in [tensor] if tensor else [each for each in _divisors(world) if each <= NODE]:
            if world % (stages * ranks) or data not in (None, world // (stages * ranks)):
                continue
            replicas = world // (stages * ranks)
            for sharding in [shard] if shard else _shards(replicas, ranks, stages, expert):
                virtual = virtual_stages if stages > 1 else 1
                found.append(Layout(world, replicas, ranks, stages, virtual, expert, sharding))
    if not found:
        raise ValueError(
            f"world={world} cannot be divided with {', '.join(f'{k}={v}' for k, v in given.items() if v)} and tensor "
            f"ranks within a node of {NODE}: give --tensor too"
        )
    yield from sorted(found, key=lambda each: (each.pipeline, each.tensor, each.shard == "zero3"))


def _shards(data: int, tensor: int, pipeline: int, expert: int) -> list[str]:
    if expert > tensor:  # replicas have different experts, which must not be averaged
        return ["zero3"]
    return ["none", "zero3"] if data > 1 and pipeline == 1 else ["none"]


def check_layout(model: PlannedModel, layout: Layout, micro_batches: int):
    """Raises ValueError, in one line, for a division that cannot be."""
    config = model.config
    split_layers(config.num_hidden_layers, layout.stages)
    if layout.virtual_stages > 1:
        rounds = max(1, micro_batches // layout.pipeline)
        if micro_batches % rounds:
            raise ValueError(
                f"micro_batches={micro_batches} must be a multiple of {rounds}, micro_batches // pipeline, for "
                f"interleaved stages; take {layout.pipeline * rounds}"
            )
    if layout.expert > 1:
        _check_experts(model, layout)
    if layout.tensor == 1 and layout.expert == 1:
        return
    styles = parallel_styles(model.module, layout.tensor, layout.expert)
    if layout.tensor > 1:
        _check_heads(model, styles, layout.tensor)
    for each in model.parameters:
        local_shape(each.name, each.shape, styles.get(each.name), layout.tensor, layout.expert)


def _check_experts(model: PlannedModel, layout: Layout):
    expert, shared = layout.expert, layout.data * layout.tensor
    if not model.experts:
        family = model.config.backbone_config.model_type
        raise ValueError(f"expert={expert}: this {family} model has no routed experts; take --expert 1")
    if model.experts % expert:
        raise ValueError(f"expert={expert} does not divide the {model.experts} routed experts of a layer")
    if expert % layout.tensor or shared % expert:
        raise ValueError(
            f"expert={expert} must be a multiple of tensor={layout.tensor} and divide data x tensor = {shared}: "
            "experts are divided among ranks that hold the same decoder layers"
        )
    if expert > layout.tensor and layout.shard == "none":
        raise ValueError(
            f"expert={expert} divides experts among replicas, which --shard none would average; take --shard zero3"
        )


def _check_heads(model: PlannedModel, styles: dict[str, str], tensor: int):
    """Where attention is divided, every rank has whole heads."""
    backbone = model.config.backbone_config
    names = {
        "q_proj": "num_attention_heads",
        "q_b_proj": "num_attention_heads",
        "kv_b_proj": "num_attention_heads",
        "k_proj": "num_key_value_heads",
        "v_proj": "num_key_value_heads",
    }
    for path, style in styles.items():
        key = names.get(path.rpartition(".")[2])
        heads = getattr(backbone, key, None) if key else None
        if style == "colwise" and heads and heads % tensor:
            raise ValueError(f"tensor={tensor} does not divide {key}={heads}: every rank needs whole heads")


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
