"""`attnres plan`: parameters, memory per device and traffic per rank before any machine is rented."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

from .plan_layout import Layout, check_layout, layouts
from .plan_memory import DTYPES, OPTIMIZERS, Plan, Prefill, Work, block_bytes, prefill_memory, sources_of
from .plan_model import PlannedModel, planned_model, read_config
from .plan_traffic import pipeline_summary, prefill_traffic, training_traffic

FORMAT = 1
USABLE = 0.9  # of a device's memory; the rest is for CUDA, NCCL, the allocator's gaps and kernels' workspaces
MOST_DEVICES = 4096  # that are tried for a suggestion
CHUNK = 16384  # tokens of a prefill at a time, the paper's

RULES = {
    "parameters": "float32 under mixed precision, as accelerate keeps them; in a prefill in the dtype of computation",
    "gradients": "float32, whole until the optimizer has stepped",
    "optimizer state": "AdamW: two float32 moments; Muon: one for the matrices of decoder layers, AdamW for the rest",
    "gathered by FSDP2": "two decoder layers, one's gradients twice (whole, and packed to be reduced), norm and head",
    "gradients between micro-batches": "whole on every rank: Trainer reduces after the last micro-batch only",
    "buckets of DDP": "a second copy of the gradients, which are reduced there",
    "casts of weights": "counted: those that autocast or a module makes, one for all micro-batches",
    "block representations": "complete sources and partial sums [B, T, D] that decoder layers hand on, all in flight",
    "hidden states": "what decoder layers hand on, all in flight",
    "activations": "counted: what autograd keeps in a forward pass of the real classes on tensors without memory, with "
    "FlashAttention and the kernels of flash-linear-attention",
    "logits": "counted the same way, and two float32 gradients of their size",
    "cache": "counted: what a forward pass leaves in transformers' cache",
    "depth logits": "float32, of every source for every sublayer",
    "one decoder layer": "at most: all that the largest would keep for a backward pass",
}


@dataclass(frozen=True)
class Options:
    """What `attnres plan` was asked; None: to be worked out.

    Attributes:
        config: folder, config.json or hub id; None: the paper's 48B-A3B.
        residual_mode, layers_per_block, num_blocks: depth options; None: as configured.
        world, data, tensor, pipeline, virtual_stages, expert, shard: see `Layout`.
        tokens, batch, micro_batches, dtype, optimizer, checkpointing: see `Work`. No micro_batches: twice the pipeline
            ranks, else one.
        device_memory: bytes of a device.
        inference: plan a prefill of `tokens` tokens.
        chunk, sequence_shards: see `Prefill`.
    """

    config: str | None = None
    residual_mode: str | None = None
    layers_per_block: int | None = None
    num_blocks: int | None = None
    world: int | None = None
    data: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    virtual_stages: int = 1
    expert: int = 1
    shard: str | None = None
    tokens: int = 4096
    batch: int = 1
    micro_batches: int | None = None
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    device_memory: int = 80 * 10**9
    inference: bool = False
    chunk: int | None = None
    sequence_shards: bool = False


def run(options: Options, say: Callable[[str], None] = lambda line: None) -> dict:
    """The plan as plain numbers: bytes and counts.

    Args:
        say: told what is being worked out.

    Raises:
        ValueError: a number that cannot be, in one line.
    """
    _check_options(options)
    say("building the model without memory for its weights")
    model = planned_model(
        read_config(
            options.config,
            residual_mode=options.residual_mode,
            layers_per_block=options.layers_per_block,
            num_blocks=options.num_blocks,
        )
    )
    describe = _prefill if options.inference else _training
    result = describe(model, options, say)
    used = {item for device in result["memory"]["devices"] for item in device["items"]}
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "model": _model_facts(model),
        **result,
        "rules": {name: rule for name, rule in RULES.items() if name in used},
    }


def _check_options(options: Options):
    for name in ("world", "data", "tensor", "pipeline", "virtual_stages", "expert", "tokens", "batch", "micro_batches"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, known in (("dtype", DTYPES), ("optimizer", OPTIMIZERS)):
        if getattr(options, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(options, name)!r}")
    if options.virtual_stages > 1 and options.pipeline == 1:
        raise ValueError(f"virtual_stages={options.virtual_stages} needs pipeline ranks: give --pipeline of at least 2")
    for name, value in (("chunk", options.chunk), ("sequence_shards", options.sequence_shards)):
        if value and not options.inference:
            raise ValueError(f"{name} is of a prefill: give --inference too")
    if options.inference and ((options.pipeline or 1) > 1 or options.shard == "zero3"):
        raise ValueError("--inference plans a prefill with tensor parallelism: leave --pipeline and --shard out")
    if options.chunk is not None and options.chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {options.chunk}")


def _model_facts(model: PlannedModel) -> dict:
    config = model.config
    return {
        "family": config.backbone_config.model_type,
        "residual_mode": config.residual_mode,
        "decoder_layers": config.num_hidden_layers,
        "blocks": config.num_blocks if config.residual_mode == "block" else None,
        "layers_per_block": config.layers_per_block if config.residual_mode == "block" else None,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tied_embeddings": model.tied,
        "routed_experts": model.experts,
        "experts_per_token": model.top_k,
        "parameters": model.counts(),
    }


def _training(model: PlannedModel, options: Options, say: Callable[[str], None]) -> dict:
    traces = {}
    limit = int(options.device_memory * USABLE)
    found = layouts(
        options.world,
        options.data,
        options.tensor,
        options.pipeline,
        options.virtual_stages,
        options.expert,
        options.shard,
    )
    plan, why = _choose(model, list(found), options, limit, traces, say)
    devices = [_device(plan, rank) for rank in range(plan.layout.pipeline)]
    worst = max(devices, key=lambda each: each["total"])
    fits = worst["total"] <= limit
    if not fits:
        say("looking for a change that would make it fit")
    return {
        "layout": asdict(plan.layout) | {"shown": str(plan.layout), "why": why},
        "work": asdict(plan.work)
        | {"tokens_per_step": plan.work.tokens * plan.work.batch * plan.work.micro_batches * plan.layout.data},
        "memory": {
            "device_memory": options.device_memory,
            "usable": limit,
            "devices": devices,
            "most": worst["total"],
            "fits": fits,
            "would_fit": None if fits else _suggest(model, plan, limit, traces),
        },
        "traffic": [
            {"pipeline_rank": rank, "rows": training_traffic(plan, rank)} for rank in range(plan.layout.pipeline)
        ],
        "pipeline": pipeline_summary(plan),
        "notes": _notes(plan),
    }


def _device(plan: Plan, rank: int) -> dict:
    items = plan.training(rank)
    held = plan.parameters(rank)
    return {
        "pipeline_rank": rank,
        "decoder_layers": sum(len(stage) for stage in plan.layers(rank)),
        "parameters": sum(each.elements for each in held),
        "sharded_parameters": sum(each.sharded if plan.zero3 else each.elements for each in held),
        "items": items,
        "total": sum(items.values()),
    }


def _most(plan: Plan) -> int:
    return max(sum(plan.training(rank).values()) for rank in range(plan.layout.pipeline))


def _work(options: Options, layout: Layout) -> Work:
    micro_batches = options.micro_batches or (2 * layout.pipeline if layout.pipeline > 1 else 1)
    return Work(options.tokens, options.batch, micro_batches, options.dtype, options.optimizer, options.checkpointing)


def _choose(model: PlannedModel, found: list[Layout], options: Options, limit: int, traces: dict, say) -> tuple:
    """The simplest layout that fits, without and then with checkpointing; where none does, the one with least memory.

    Impossible layouts are passed over as long as there are others.
    """
    tried, refused = [], None
    for layout in found:
        work = _work(options, layout)
        try:
            check_layout(model, layout, work.micro_batches)
        except ValueError as error:
            refused = error if refused is None else refused
            continue
        for checkpointing in [work.checkpointing] if len(found) == 1 else sorted({work.checkpointing, True}):
            say(f"working out {layout}{', checkpointing' if checkpointing else ''}")
            plan = Plan(model, layout, replace(work, checkpointing=checkpointing), traces)
            most = _most(plan)
            if most <= limit or len(found) == 1:
                return plan, _why(plan, tried, found)
            tried.append((most, plan))
    if not tried:
        raise refused
    most, plan = min(tried, key=lambda each: each[0])
    return plan, "nothing that was tried fits; this needs least"


def _why(plan: Plan, tried: list, found: list[Layout]) -> str:
    if len(found) == 1:
        return "as given"
    if not tried:
        return "the simplest, and it fits"
    most, simpler = tried[-1]
    checkpointing = ", checkpointing" if simpler.work.checkpointing else ""
    return f"the simplest that fits; {simpler.layout}{checkpointing} would need {most / 1e9:.1f} GB"


def _suggest(model: PlannedModel, plan: Plan, limit: int, traces: dict) -> str | None:
    """The first change that makes a plan fit, each tried alone and then on top of those before it."""
    layout, work = plan.layout, plan.work
    changes = []
    if not work.checkpointing:
        changes.append(("--checkpointing", {}, {"checkpointing": True}))
    if layout.shard == "none" and layout.data > 1:
        changes.append(("--shard zero3", {"shard": "zero3"}, {}))
    if work.batch > 1:
        changes.append(("--batch 1", {}, {"batch": 1}))
    for name in ("data", "tensor", "pipeline"):
        factor, shown = 2, "twice"
        while factor * layout.world <= MOST_DEVICES and factor <= 64:
            ranks = getattr(layout, name) * factor
            if name == "tensor" and ranks > 8:
                break
            update = {name: ranks, "world": layout.world * factor}
            if name == "data" and layout.pipeline == 1:
                update["shard"] = "zero3"
            if name != "data" or update.get("shard", layout.shard) == "zero3":
                shown = f"--world {layout.world * factor} --{name} {ranks}"
                shown += " --shard zero3" if update.get("shard", layout.shard) != layout.shard else ""
                changes.append((shown, update, {}))
            factor *= 2
    alone = [[change] for change in changes]
    first = [change for change in changes if not change[1].get("world")]
    together = [first] if len(first) > 1 else []
    together += [[*first, change] for change in changes if first and change not in first]
    for attempt in alone + together:
        changed = layout, work
        for _, of_layout, of_work in attempt:
            changed = replace(changed[0], **of_layout), replace(changed[1], **of_work)
        if changed[0].pipeline != layout.pipeline:
            changed = changed[0], replace(changed[1], micro_batches=2 * changed[0].pipeline)
        try:
            check_layout(model, changed[0], changed[1].micro_batches)
            most = _most(Plan(model, *changed, traces))
        except ValueError:
            continue
        if most <= limit:
            return f"{' '.join(shown for shown, _, _ in attempt)} ({most / 1e9:.1f} GB)"
    return None


def _notes(plan: Plan) -> list[str]:
    layout, notes = plan.layout, []
    if layout.tensor > 1:
        held = sum(each.elements for rank in range(layout.pipeline) for each in plan.parameters(rank))
        single = Plan(plan.model, replace(layout, tensor=1, expert=1), plan.work)
        whole = sum(each.elements for rank in range(layout.pipeline) for each in single.parameters(rank))
        divided = (whole - held) / (whole * (1 - 1 / layout.tensor))
        family = plan.model.config.backbone_config.model_type
        notes.append(
            f"the tensor-parallel plan of {family} in transformers {version('transformers')} divides "
            f"{min(divided, 1):.1%} of the parameters; every rank has the rest"
        )
    if layout.pipeline > 1 and plan.zero3:
        notes.append("on paper only: attnres.parallel.Pipeline replicates stages, it does not shard them")
    if layout.pipeline > 1 and layout.expert > 1:
        notes.append("on paper only: transformers refuses token dispatch to experts within pipeline stages")
    return notes


def _prefill(model: PlannedModel, options: Options, say: Callable[[str], None]) -> dict:
    found = list(layouts(options.world, options.data, options.tensor, options.pipeline or 1, 1, options.expert, "none"))
    layout = _most_tensor_ranks(model, found)
    work = Work(options.tokens, options.batch, 1, options.dtype)
    prefill = Prefill(options.chunk, options.sequence_shards)
    _check_prefill(layout, work, prefill)
    say(f"working out a prefill of {options.tokens} tokens, {layout}")
    plan = Plan(model, layout, work)
    items, collectives = prefill_memory(plan, prefill)
    total, limit = sum(items.values()), int(options.device_memory * USABLE)
    return {
        "layout": asdict(layout)
        | {"shown": str(layout), "why": "as given" if len(found) == 1 else "the most tensor-parallel ranks of a node"},
        "work": {"tokens": work.tokens, "batch": work.batch, "dtype": work.dtype, **asdict(prefill)},
        "memory": {
            "device_memory": options.device_memory,
            "usable": limit,
            "devices": [{"pipeline_rank": 0, "items": items, "total": total}],
            "most": total,
            "fits": total <= limit,
            "would_fit": None if total <= limit else _suggest_prefill(model, plan, prefill, limit),
        },
        "blocks": block_facts(plan, prefill),
        "traffic": [{"pipeline_rank": 0, "rows": prefill_traffic(plan, prefill, collectives)}],
        "pipeline": None,
        "notes": _notes(plan),
    }


def _check_prefill(layout: Layout, work: Work, prefill: Prefill):
    if prefill.sequence_shards and layout.tensor == 1:
        raise ValueError("sequence_shards needs tensor-parallel ranks: give --tensor of at least 2")
    if prefill.chunk is not None and prefill.chunk > work.tokens:
        raise ValueError(f"chunk={prefill.chunk} is longer than the prefill of tokens={work.tokens}")


def _most_tensor_ranks(model: PlannedModel, found: list[Layout]) -> Layout:
    refused = None
    for layout in sorted(found, key=lambda each: -each.tensor):
        try:
            check_layout(model, layout, 1)
        except ValueError as error:
            refused = error if refused is None else refused
        else:
            return layout
    raise refused


def _suggest_prefill(model: PlannedModel, plan: Plan, prefill: Prefill, limit: int) -> str | None:
    """The first change that makes a prefill fit, on top of those before it."""
    layout, shown = plan.layout, []
    changes = [] if prefill.chunk else [(f"--chunk {CHUNK}", {"chunk": CHUNK}, 1)]
    changes += [(f"--world {layout.world * n} --tensor {layout.tensor * n}", {}, n) for n in (2, 4, 8)]
    for name, update, times in changes:
        if update.get("chunk", 0) > plan.work.tokens:
            continue
        prefill = replace(prefill, **update)
        shown = [*(each for each in shown if times == 1 or not each.startswith("--world")), name]
        wider = replace(layout, tensor=layout.tensor * times, world=layout.world * times)
        try:
            check_layout(model, wider, 1)
            most = sum(prefill_memory(Plan(model, wider, plan.work), prefill)[0].values())
        except ValueError:
            continue
        if most <= limit:
            return f"{' '.join(shown)} ({most / 1e9:.1f} GB)"
    return None


def block_facts(plan: Plan, prefill: Prefill) -> dict | None:
    """Block representations of a prefill in bytes: as the paper counts them, N T D, and with the embedding, which is a
    source too; whole, divided among tensor-parallel ranks, and so in chunks."""
    config = plan.model.config
    if config.residual_mode == "standard":
        return None
    blocks = sources_of(plan.model) - 1
    work, ranks = plan.work, plan.layout.tensor
    chunk = min(prefill.chunk or CHUNK, work.tokens)
    itemsize = DTYPES[work.dtype].itemsize

    def sizes(sources: int) -> dict[str, int]:
        def of(tokens: int, shards: int = 1) -> int:
            return block_bytes(sources, work.batch * tokens, config.hidden_size, itemsize, shards)

        return {
            "sources": sources,
            "whole": of(work.tokens),
            "sequence_sharded": of(work.tokens, ranks),
            "sequence_sharded_in_chunks": of(chunk, ranks),
        }

    return {"shards": ranks, "chunk": chunk, "paper": sizes(blocks), "here": sizes(blocks + 1)}
