"""Summary of a checkpoint folder, from its headers alone."""

import os
from math import prod

from .checkpoint import read_checkpoint
from .converter import depth_is_zero
from .layouts import PRENORM, Source, understand

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ROUTED_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k")


def inspect_checkpoint(folder: str | os.PathLike) -> dict:
    """Facts of a checkpoint folder: family, layout, layers, blocks, dtypes, parameters, shards, bytes, depth tensors.

    Raises:
        CheckpointError: the folder cannot be read, in one line.
    """
    source = understand(read_checkpoint(folder))
    config, checkpoint = source.config, source.checkpoint
    elements = {name: prod(shape) for name, shape in source.shapes.items()}
    depth = sum(elements[name] for name in source.depth_names if name in elements)
    total = sum(elements.values())
    experts = sum(count for name, count in elements.items() if ".experts." in name)
    is_block = source.layout != PRENORM and config.residual_mode == "block"
    return {
        "folder": str(checkpoint.folder),
        "layout": source.layout,
        "family": config.backbone_config.model_type,
        "residual_mode": "plain" if source.layout == PRENORM else config.residual_mode,
        "decoder_layers": config.num_hidden_layers,
        "layers_per_block": config.layers_per_block if is_block else None,
        "blocks": config.num_blocks if is_block else None,
        "dtypes": sorted({source.tensor(name).dtype for name in source.stored_names}),
        "parameters": total,
        "active_parameters": total - experts + round(experts * _routed_share(source)),
        "depth_parameters": depth,
        "depth_tensors": _depth_state(source),
        "shards": len(checkpoint.shards),
        "bytes": checkpoint.bytes,
    }


def _routed_share(source: Source) -> float:
    backbone = source.config.backbone_config
    experts = next((getattr(backbone, key) for key in EXPERT_KEYS if getattr(backbone, key, None)), None)
    routed = next((getattr(backbone, key) for key in ROUTED_KEYS if getattr(backbone, key, None)), None)
    return routed / experts if experts and routed else 1.0


def _depth_state(source: Source) -> str:
    if not source.depth_names & set(source.stored_names):
        return "none"
    return "pseudo-queries are zero" if depth_is_zero(source) else "trained"


def shown_size(size: int) -> str:
    """A number of bytes in the decimal unit that suits it."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def inspection_table(facts: dict) -> str:
    """The facts as a table for the terminal; numbers in full and, where they are large, rounded."""

    def shown(key, value) -> str:
        if key.endswith("parameters"):
            return f"{value:,}" + (f" ({value / 1e9:.2f} B)" if value >= 1e7 else "")
        if key == "bytes":
            return f"{value:,} ({shown_size(value)})"
        return ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)

    width = max(map(len, facts))
    return "\n".join(f"{key.replace('_', ' '):<{width}}  {shown(key, value)}" for key, value in facts.items())
