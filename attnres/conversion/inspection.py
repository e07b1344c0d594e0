"""Summarises a checkpoint folder from its headers."""

import os
from math import prod

from .checkpoint import read_checkpoint
from .layouts import PRENORM, Source, understand

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ROUTED_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k")


def inspect_checkpoint(folder: str | os.PathLike) -> dict:
    """Returns family, layout, layers, blocks, dtypes, parameters, files and depth tensors of a checkpoint folder."""
    source = understand(read_checkpoint(folder))
    config, checkpoint = source.config, source.checkpoint
    elements = {name: prod(shape) for name, shape in source.shapes.items()}
    total = sum(elements.values())
    experts = sum(count for name, count in elements.items() if ".experts." in name)
    is_block = source.layout != PRENORM and config.residual_mode == "block"
    depth_state = "none"
    if source.depth_names & set(source.stored_names):
        depth_state = "pseudo-queries are zero" if source.depth_is_zero() else "trained"
    return {
        "folder": str(checkpoint.folder),
        "layout": source.layout,
        "family": config.backbone_config.model_type,
        "residual_mode": "plain" if source.layout == PRENORM else config.residual_mode,
        "decoder_layers": config.num_hidden_layers,
        "layers_per_block": config.layers_per_block if is_block else None,
        "blocks": config.num_blocks if is_block else None,
        "dtypes": sorted({checkpoint.tensors[stored].dtype for stored in source.stored_names.values()}),
        "parameters": total,
        "active_parameters": total - experts + round(experts * _routed_share(source)),
        "depth_parameters": sum(elements.get(name, 0) for name in source.depth_names),
        "depth_tensors": depth_state,
        "shards": len(checkpoint.shards),
        "bytes": checkpoint.bytes,
    }


def _routed_share(source: Source) -> float:
    """Returns the share of the experts that a token is routed to; 1 for a model without experts."""
    backbone = source.config.backbone_config
    experts = next((getattr(backbone, key) for key in EXPERT_KEYS if getattr(backbone, key, None)), None)
    routed = next((getattr(backbone, key) for key in ROUTED_KEYS if getattr(backbone, key, None)), None)
    return routed / experts if experts and routed else 1.0


def shown_size(size: int) -> str:
    """Returns a number of bytes in B, kB, MB or GB, rounded to three digits."""
    power = min(3, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def inspection_table(facts: dict) -> str:
    """Returns the facts as a table for the terminal."""

    def shown(value) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return ", ".join(value) if isinstance(value, list) else value or "-"

    width = max(map(len, facts))
    return "\n".join(f"{key.replace('_', ' '):<{width}}  {shown(value)}" for key, value in facts.items())
