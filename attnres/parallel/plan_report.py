"""A plan as readable text; `--json` prints the plan itself."""

UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def as_text(plan: dict) -> str:
    """Parameters, layout, memory per device, traffic per rank, and by which rules."""
    parts = [_model(plan), _layout(plan), _memory(plan)]
    parts += [_blocks(plan)] if plan.get("blocks") else []
    parts += [_traffic(plan)]
    parts += [_pipeline(plan)] if plan["pipeline"] else []
    parts += [_rules(plan)]
    return "\n\n".join(parts) + "\n"


def size(number: int) -> str:
    """Bytes in the decimal unit that suits them."""
    for unit, factor in UNITS:
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number} B"


def _count(number: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}" if unit == "B" else f"{number / factor:.1f} {unit}"
    return str(number)


def _table(rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _model(plan: dict) -> str:
    model, counts = plan["model"], plan["model"]["parameters"]
    mode = model["residual_mode"]
    if mode == "block":
        mode += f", {model['blocks']} blocks of {model['layers_per_block']} decoder layers"
    rows = [["parameters", f"{counts['total']:,}", _count(counts["total"])]]
    rows += [["active per token", f"{counts['active']:,}", _count(counts["active"])]]
    rows += [
        [f"  {name.replace('_', ' ')}", f"{counts[name]:,}", _count(counts[name])]
        for name in ("embeddings", "depth_mixer", "routed_experts")
        if counts[name]
    ]
    rows += [
        [f"  {kind['layers']} x {kind['kind']}", f"{kind['parameters_each']:,}", _count(kind["parameters_each"])]
        for kind in counts["layer_kinds"]
    ]
    experts = f", {model['experts_per_token']} of {model['routed_experts']} experts" if model["routed_experts"] else ""
    head = f"{model['family']}, {model['decoder_layers']} decoder layers, D={model['hidden_size']}{experts}; {mode}"
    return f"{head}\n{_table(rows)}"


def _layout(plan: dict) -> str:
    layout, work = plan["layout"], plan["work"]
    options = [f"{work['tokens']:,} tokens", f"batch {work['batch']}"]
    if "micro_batches" in work:
        options += [_micro_batches(work["micro_batches"]), f"{work['tokens_per_step']:,} tokens per step"]
        options += [work["optimizer"], *(["checkpointing"] if work["checkpointing"] else [])]
    else:
        options = ["prefill", *options]
        options += [f"chunks of {work['chunk']:,}"] if work["chunk"] else []
        options += ["sequence shards"] if work["sequence_shards"] else []
    devices = f"{layout['world']} device{'s' if layout['world'] > 1 else ''}: {layout['shown']}"
    return f"{devices} ({layout['why']})\n{', '.join([*options, work['dtype']])}"


def _micro_batches(number: int) -> str:
    return f"{number} micro-batch{'es' if number > 1 else ''}"


def _memory(plan: dict) -> str:
    memory = plan["memory"]
    devices = memory["devices"]
    names = list(dict.fromkeys(name for device in devices for name in device["items"]))
    rows = [["memory per device", *(f"stage rank {each['pipeline_rank']}" for each in devices)]]
    if len(devices) == 1:
        rows = [["memory per device", ""]]
    else:
        rows += [["decoder layers", *(str(each["decoder_layers"]) for each in devices)]]
    rows += [[name, *(size(each["items"].get(name, 0)) for each in devices)] for name in names]
    rows += [["total", *(size(each["total"]) for each in devices)]]
    limit = f"{size(memory['usable'])} of {size(memory['device_memory'])}"
    if memory["fits"]:
        verdict = f"fits: {size(memory['most'])} of the {limit} that are counted on"
    else:
        verdict = f"DOES NOT FIT: {size(memory['most'])}, more than the {limit} that are counted on"
        change = memory["would_fit"]
        verdict += f"; it would with {change}" if change else "; no change that was tried makes it fit"
    return f"{_table(rows)}\n{verdict}"


def _blocks(plan: dict) -> str:
    blocks = plan["blocks"]
    shards, chunk = blocks["shards"], blocks["chunk"]
    rows = [["block representations", "sources", "whole", f"over {shards} ranks", f"in chunks of {chunk:,}"]]
    for title, key in (("as the paper counts, N T D", "paper"), ("with the embedding, as kept", "here")):
        one = blocks[key]
        sizes = [size(one[name]) for name in ("whole", "sequence_sharded", "sequence_sharded_in_chunks")]
        rows.append([title, str(one["sources"]), *sizes])
    return _table(rows)


def _traffic(plan: dict) -> str:
    lines = []
    unit = "step" if "micro_batches" in plan["work"] else "prefill"
    busiest = max(plan["traffic"], key=lambda each: sum(row["sent_bytes"] for row in each["rows"]))
    if not busiest["rows"]:
        return f"traffic per rank and {unit}: none"
    title = f"traffic per rank and {unit}"
    if len(plan["traffic"]) > 1:
        title += f", of stage rank {busiest['pipeline_rank']}, which sends most"
    rows = [[title, "operation", "ranks", "calls", "payload", "sent"]]
    for row in busiest["rows"]:
        cells = [str(row["ranks"]), f"{row['calls']:,}", size(row["payload_bytes"]), size(row["sent_bytes"])]
        rows.append([row["what"], row["operation"].replace("_", "-"), *cells])
    rows.append(["total", "", "", "", "", size(sum(row["sent_bytes"] for row in busiest["rows"]))])
    lines.append(_table(rows))
    return "\n".join(lines)


def _pipeline(plan: dict) -> str:
    pipeline = plan["pipeline"]
    rows = [["crossing all stages forward", "sources", "partial sums", "per step", "paper's formula", "per step"]]
    for name in ("naive", "cached"):
        one = pipeline[name]
        paper = [f"{one['paper']:.1f}", size(one["paper_bytes_per_step"])] if "paper" in one else ["-", "-"]
        rows.append([name, str(one["sources"]), str(one["partial_sums"]), size(one["bytes_per_step"]), *paper])
    split = ", ".join(map(str, pipeline["decoder_layers_per_stage"]))
    text = f"{_table(rows)}\ndecoder layers per stage: {split}"
    if "blocks_per_stage" in pipeline:
        text += (
            f"; N_p = {pipeline['blocks_per_stage']:.3g} blocks. The formulas leave out the embedding, a source too, "
            "and partial sums;\nbeyond the first round they count P stages' blocks per crossing, of which the receiver "
            "made one stage's itself."
        )
    return text


def _rules(plan: dict) -> str:
    lines = [f"- {name}: {rule}" for name, rule in plan["rules"].items()]
    lines += [f"- {note}" for note in plan["notes"]]
    lines.append("- not counted: CUDA itself, NCCL, the allocator's gaps, workspaces; a tenth is left free for them")
    versions = ", ".join(f"{name} {number}" for name, number in plan["versions"].items())
    return "\n".join([f"how it was worked out ({versions}):", *lines])
