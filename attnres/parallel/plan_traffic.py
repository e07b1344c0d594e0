"""Bytes that one rank sends per step, or per prefill.

A collective over P ranks on n bytes is counted as its ring algorithm sends: all-reduce 2 (P - 1) / P n, all-gather,
reduce-scatter and all-to-all (P - 1) / P n each, n being the whole tensor (of an all-to-all, what one rank has).
"""

from collections import Counter

from .plan_layout import Layout
from .plan_memory import DTYPES, FLOAT32, Held, Plan, Prefill
from .plan_model import DEPTH_MIXER, EMBEDDING, HEAD
from .plan_trace import Collective
from .traffic import cached_blocks, naive_blocks, plan_routes

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP reduces at once
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


def sent(kind: str, ranks: int, payload: int) -> int:
    """Bytes that a rank sends in one collective operation."""
    return RING[kind] * (ranks - 1) * payload // ranks


def row(what: str, kind: str, ranks: int, calls: int, payload: int) -> dict:
    """One line of the table: `payload` is the sum over the calls."""
    return {
        "what": what,
        "operation": kind,
        "ranks": ranks,
        "calls": calls,
        "payload_bytes": payload,
        "sent_bytes": sent(kind, ranks, payload),
    }


def training_traffic(plan: Plan, rank: int) -> list[dict]:
    """Of a device of a pipeline rank, per step."""
    rows = _data(plan, plan.parameters(rank))
    times = plan.work.micro_batches
    own = [layer for stage in plan.layers(rank) for layer in stage]
    owners = set(own)
    owners |= {EMBEDDING} if rank == 0 else set()
    owners |= {HEAD} if rank == plan.layout.pipeline - 1 else set()
    mine = [each for each in plan.trace.collectives if each.owner in owners]
    if plan.work.checkpointing:  # what decoder layers did forward, they do again in the backward pass
        mine += [each for each in mine if isinstance(each.owner, int) and not each.backward]
    rows += _by_plan(mine, plan.layout, times)
    return [each for each in rows + _pipeline_rows(plan, rank) if each["calls"]]


def _data(plan: Plan, held: list[Held]) -> list[dict]:
    rows = []
    for experts in (False, True):
        own = [each for each in held if (each.plan.routed and plan.layout.expert > 1) == experts]
        ranks = plan.layout.expert_replicas if experts else plan.layout.data
        if not own or ranks == 1:
            continue
        name = "experts" if experts else "parameters" if plan.layout.expert > 1 else "all parameters"
        if not plan.zero3:
            size = sum(each.elements for each in own) * FLOAT32
            calls = len(own) if plan.layout.pipeline > 1 else 1 + -(-max(0, size - FIRST_BUCKET) // BUCKET)
            rows.append(row(f"data parallel: gradients of {name}", "all_reduce", ranks, calls, size))
            continue
        units = plan.units(own)
        sizes = {
            owner: sum(each.sharded for each in unit) * ranks * plan.work.computed_in for owner, unit in units.items()
        }
        kept = {HEAD, DEPTH_MIXER}  # stay whole from their use to the backward pass
        if plan.model.tied:
            kept.add(EMBEDDING)
        again = [owner for owner in sizes if owner not in kept]
        times = plan.work.micro_batches
        once = sum(sizes.values())
        twice = sum(sizes[owner] for owner in again)
        rows += [
            row(f"FSDP2, forward: {name}", "all_gather", ranks, len(sizes) * times, once * times),
            row(f"FSDP2, backward: {name}", "all_gather", ranks, len(again) * times, twice * times),
            row(f"FSDP2, backward: gradients of {name}", "reduce_scatter", ranks, len(sizes), once),
        ]
    return rows


def _by_plan(collectives: list[Collective], layout: Layout, times: int) -> list[dict]:
    """Rows of the tensor- and expert-parallel plans."""
    calls, payloads = Counter(), Counter()
    for each in collectives:
        where = "decoder layers" if isinstance(each.owner, int) else each.owner
        key = (each.group, where, "backward" if each.backward else "forward", each.kind)
        calls[key] += times
        payloads[key] += each.payload * times
    ranks = {"tensor": layout.tensor, "expert": layout.expert}
    return [
        row(f"{group} parallel, {direction}: {where}", kind, ranks[group], calls[key], payloads[key])
        for key in calls
        for group, where, direction, kind in [key]
    ]


def _pipeline_rows(plan: Plan, rank: int) -> list[dict]:
    """What a rank sends to the next stages, and of gradients to the previous ones."""
    if plan.layout.pipeline == 1:
        return []
    routes = plan_routes(plan.model.config, plan.bounds, plan.layout.pipeline, caching=True)
    stages = plan.layout.stages_of(rank)
    size = stream_bytes(plan) * plan.work.micro_batches
    forward = sum(len(routes[stage].sent) + routes[stage].partial_sent for stage in stages)
    backward = sum(len(routes[stage].received) + routes[stage].partial_received for stage in stages)
    rows = [
        _send("pipeline, forward: sources and partial sums", forward * plan.work.micro_batches, forward * size),
        _send("pipeline, backward: their gradients", backward * plan.work.micro_batches, backward * size),
    ]
    if plan.model.tied and rank in (0, plan.layout.pipeline - 1):
        embedding = next(each for each in plan.parameters(rank) if each.plan.owner == EMBEDDING)
        rows.append(_send("pipeline: gradient of the tied embedding", 1, embedding.elements * FLOAT32))
    return rows


def _send(what: str, calls: int, size: int) -> dict:
    return {
        "what": what,
        "operation": "send",
        "ranks": 2,
        "calls": calls,
        "payload_bytes": size,
        "sent_bytes": size,
    }


def stream_bytes(plan: Plan) -> int:
    """One source, partial sum or hidden state of a micro-batch: `[B, T, D]`."""
    narrow = plan.work.mixed and plan.zero3
    itemsize = DTYPES["bfloat16" if narrow else "float32"].itemsize
    return plan.work.batch * plan.work.tokens * plan.model.config.hidden_size * itemsize


def pipeline_summary(plan: Plan) -> dict | None:
    """What crosses between all stages in forward passes: numbers per token, each times D, exactly and by the paper's
    formulas; and bytes per step, which gradients take once more on the way back."""
    layout, config = plan.layout, plan.model.config
    if layout.pipeline == 1:
        return None
    result = {
        "decoder_layers_per_stage": [end - start for start, end in zip(plan.bounds, plan.bounds[1:], strict=False)]
    }
    for name, caching in (("naive", False), ("cached", True)):
        routes = plan_routes(config, plan.bounds, layout.pipeline, caching)
        result[name] = {
            "sources": sum(len(each.sent) for each in routes),
            "partial_sums": sum(each.partial_sent for each in routes),
        }
        crossings = sum(result[name].values())
        result[name]["bytes_per_step"] = crossings * stream_bytes(plan) * plan.work.micro_batches
    blocks = {"standard": None, "full": config.num_sublayers, "block": config.num_blocks}[config.residual_mode]
    if blocks is not None:
        per_stage = blocks / layout.stages
        for name, formula in (("naive", naive_blocks), ("cached", cached_blocks)):
            paper = formula(layout.pipeline, layout.virtual_stages, per_stage)
            size = round(paper * stream_bytes(plan) * plan.work.micro_batches)
            result[name] |= {"paper": paper, "paper_bytes_per_step": size}
        result["blocks_per_stage"] = per_stage
    return result


def prefill_traffic(plan: Plan, prefill: Prefill, collectives: list[Collective]) -> list[dict]:
    """Of one prefill in chunks; what sequence shards add is the gathering of every mixed input."""
    work, layout = plan.work, plan.layout
    at_once = min(prefill.chunk or work.tokens, work.tokens)
    chunks = -(-work.tokens // at_once)
    rows = _by_plan(collectives, layout, 1)
    for each in rows:
        each["payload_bytes"] = round(each["payload_bytes"] * work.tokens / at_once)
        each["calls"] *= chunks
        each["sent_bytes"] = sent(each["operation"], each["ranks"], each["payload_bytes"])
    if prefill.sequence_shards:
        config = plan.model.config
        size = work.batch * work.tokens * config.hidden_size * DTYPES[work.dtype].itemsize
        inputs = config.num_sublayers + 1
        rows.append(row("sequence shards: mixed inputs", "all_gather", layout.tensor, inputs * chunks, inputs * size))
    return rows
