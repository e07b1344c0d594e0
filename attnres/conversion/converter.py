"""Converts a checkpoint folder without loading the model.

Weight files are copied unchanged. What changes is the configuration, the index, and one small file with the depth
tensors. A weight file is written anew, tensor by tensor, only where a tensor has another name or shape in the layout of
the result.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm

from ..configuration_attnres import DEPTH_OPTIONS, AttnResConfig
from ..folders import replaced_folder
from ..messages import say
from . import kimi_k3
from .checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, CheckpointError, inside, read_checkpoint
from .files import check_apart, copy_file, write_code, write_companions, write_index
from .layouts import ATTNRES, KIMI_K3, PRENORM, Source, new_depth_tensors, understand
from .pieces import TORCH_DTYPES, Piece, write_pieces
from .sharded import find_shards, join_shards
from .structure import check_structure

DEPTH_SHARD = "model-depth.safetensors"
SHARDS = "shards"  # layout of what FSDP saves


@dataclass
class Conversion:
    """The outcome of a conversion."""

    source: Path
    result: Path
    from_layout: str  # `prenorm`, `attnres`, `kimi-k3` or `fla`, or `shards` for what FSDP saved
    to_layout: str
    shards: int  # number of weight files, including the one with the depth tensors
    bytes: int  # their total size
    depth: str  # describes the residual mode and the blocks of the result
    left_out: list[str]  # names of tensors of other parts of a multimodal checkpoint, which are not converted
    report: dict | None = None  # content of `conversion_report.json`; None without verification


def convert(
    source: str | os.PathLike,
    result: str | os.PathLike,
    *,
    to: str | None = None,
    from_layout: str | None = None,
    verify: str = "auto",
    link: bool = False,
    overwrite: bool = False,
    reinit_depth: bool = False,
    keep_packed: bool = False,
    engine: str | None = None,
    progress: bool = False,
    **depth_options,
) -> Conversion:
    """Converts a checkpoint folder; `result` appears only when it is complete and verified.

    Args:
        source: folder with safetensors weights, or with the shards that FSDP saved. It is not changed.
        result: folder to create.
        to: layout of the result, `"attnres"` (default), `"prenorm"` or `"kimi-k3"`.
        from_layout: layout that `source` must have; by default the one that its configuration describes.
        verify: `"auto"`, `"full"` or `"none"`, see `verification.verify_conversion`.
        link: make hard links to unchanged weight files instead of copies: fast, but saving over the result changes the
            source.
        overwrite: replace an existing `result` once the new one is complete.
        reinit_depth: start with new (zero) pseudo-queries where trained ones do not fit the new depth options.
        keep_packed: keep MXFP4 weights packed instead of converting them to bfloat16. The result can be copied and
            converted again but not loaded, and it is not verified.
        engine: engine that is to load the result: `"llama.cpp"`, `"vllm"`, `"sglang"` or `"mlx"` with `to="kimi-k3"`;
            otherwise only `"vllm"`, which then runs the code of transformers.
        progress: show progress bars on stderr.
        depth_options: `residual_mode`, `layers_per_block`, `num_blocks`, `depth_variant` or `scale_norm_eps` of the
            result.

    Raises:
        CheckpointError: the source cannot be read, the conversion is not possible, or the result does not compute what
            the source computes.
        OSError: the result cannot be written, or exists and `overwrite` is false.
    """
    source, result, to = Path(source), Path(result), to or ATTNRES
    if to not in (ATTNRES, PRENORM, KIMI_K3):
        raise CheckpointError(f"--to must be {ATTNRES}, {PRENORM} or {KIMI_K3}, got {to!r}.")
    check_apart(source, result)
    if find_shards(source):
        others = {"to": to != ATTNRES, "from_layout": from_layout, "link": link, "reinit_depth": reinit_depth}
        others |= {"keep_packed": keep_packed, "engine": engine, **depth_options}
        given = [name for name, value in others.items() if value]
        if given:
            raise CheckpointError(
                f"{source}: contains the shards of a run, and {given[0]} is for whole checkpoints. Join them first, "
                "without options, then convert the result."
            )
        if progress:
            say(f"joining the shards of {source}")
        with replaced_folder(result, overwrite) as folder:
            depth = _depth_text(join_shards(source, folder), ATTNRES)
            written = read_checkpoint(folder)
            return Conversion(source, result, SHARDS, ATTNRES, len(written.shards), written.bytes, depth, [])
    origin = understand(read_checkpoint(source), from_layout)
    if engine is not None and to != KIMI_K3 and (to, engine) != (ATTNRES, "vllm"):
        raise CheckpointError(
            f"--for {engine} needs --to kimi-k3, got {to}; only vllm runs other layouts, with the code of transformers."
        )
    keep_packed = keep_packed and bool(origin.packed)
    quantised = kimi_k3.quantisation(origin.checkpoint.config) if keep_packed else None
    config = _result_config(origin, to, depth_options, engine)
    if quantised is not None:
        config.quantization_config = quantised
    check_structure(origin)
    change = _depth_change(origin, config, to, reinit_depth)
    pieces = origin.pieces(to, keep_packed, engine, dropped=() if change is None else origin.depth_names)
    depth_tensors = {}
    if change == "zero":
        dtype, stacked = TORCH_DTYPES[origin.checkpoint.float_dtype], to == ATTNRES and engine is not None
        depth_tensors = new_depth_tensors(config, dtype, stacked)
    if to == KIMI_K3 and kimi_k3.is_multimodal(config.backbone_config, engine):
        depth_tensors = {kimi_k3.PREFIX + name: tensor for name, tensor in depth_tensors.items()}

    with replaced_folder(result, overwrite) as folder:
        weight_map = _write_shards(origin, pieces, to, folder, link, progress)
        name = DEPTH_SHARD if len(set(weight_map.values())) > 1 else "model-00002-of-00002.safetensors"
        if depth_tensors:
            save_file(depth_tensors, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(depth_tensors, name))
        if set(weight_map.values()) != {SINGLE_NAME}:
            size = sum((folder / shard).stat().st_size for shard in set(weight_map.values()))
            write_index(folder, weight_map, size)
        if depth_tensors:
            shutil.copymode(folder / INDEX_NAME, folder / name)  # safetensors makes it readable for the owner only
        write_companions(origin.checkpoint.folder, folder)
        _write_config(folder, config, to, engine, quantised)
        written = read_checkpoint(folder)
        depth, size = _depth_text(config, to), written.bytes
        outcome = Conversion(source, result, origin.layout, to, len(written.shards), size, depth, origin.left_out)
        if verify != "none" and not keep_packed:
            from .verification import verify_conversion

            outcome.report = verify_conversion(origin, understand(written), verify, progress, change == "zero")
            (folder / "conversion_report.json").write_text(json.dumps(outcome.report, indent=2) + "\n")
    return outcome


def _depth_text(config: AttnResConfig, to: str) -> str:
    if to == PRENORM or config.residual_mode == "standard":
        return "plain residuals"
    if config.residual_mode == "full":
        return f"full: {config.num_sublayers} sublayers"
    return f"{config.num_blocks} blocks of {config.layers_per_block} decoder layers"


def _result_config(origin: Source, to: str, depth_options: dict, engine: str | None) -> AttnResConfig:
    options = {key: value for key, value in depth_options.items() if value is not None}
    unknown = set(options) - set(DEPTH_OPTIONS)
    if unknown:
        raise TypeError(f"convert got an unexpected option {sorted(unknown)[0]!r}")
    variant = options.get("depth_variant") or origin.config.depth_variant
    if to != ATTNRES and variant != "attnres":
        raise CheckpointError(f"--to {to}: has no depth_variant {variant!r}, only 'attnres'.")
    if to == PRENORM and options:
        raise CheckpointError(f"{sorted(options)[0]} is an option of an AttnRes result; --to {to} takes none.")
    content = origin.config.to_dict()
    if "num_blocks" in options and "layers_per_block" not in options:
        content.pop("layers_per_block")
    config = AttnResConfig.from_dict({**content, **options})
    if to == KIMI_K3:
        kimi_k3.write_config(config, engine)  # raises before anything is written
    return config


def _depth_change(origin: Source, config: AttnResConfig, to: str, reinit_depth: bool) -> str | None:
    """Returns what happens to the depth tensors: `"zero"`, new ones; `"drop"`, none; None, those of the source stay."""
    old, new, folder = origin.config, config, origin.checkpoint.folder
    has_depth = origin.layout != PRENORM and old.residual_mode != "standard"
    wants_depth = to != PRENORM and new.residual_mode != "standard"
    if not has_depth:
        return "zero" if wants_depth else "drop" if origin.depth_names & set(origin.stored_names) else None
    zero = origin.depth_is_zero()
    if not wants_depth:
        if not zero:
            raise CheckpointError(
                f"{folder}: has trained pseudo-queries, so no model with plain residuals computes the same."
            )
        return "drop"
    same = (old.residual_mode, old.depth_variant) == (new.residual_mode, new.depth_variant) and (
        new.residual_mode == "full" or old.layers_per_block == new.layers_per_block
    )
    if same and not reinit_depth:
        return None
    if not zero and not reinit_depth:
        raise CheckpointError(
            f"{folder}: its pseudo-queries are trained for residual_mode={old.residual_mode}, "
            f"layers_per_block={old.layers_per_block}; other depth options need --reinit-depth, which resets them."
        )
    return "zero" if reinit_depth or old.depth_variant != new.depth_variant else None


def _write_shards(origin: Source, pieces: list[Piece], to: str, folder: Path, link: bool, progress: bool) -> dict:
    """Writes the weight files of the result, one for each of the source, and returns the file of every tensor."""
    tensors, source = origin.checkpoint.tensors, origin.checkpoint.folder
    in_source = Counter(tensor.shard for tensor in tensors.values())
    by_shard: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_shard.setdefault(tensors[piece.stored[0]].shard, []).append(piece)
    weight_map, total = {}, sum(piece.bytes for piece in pieces)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        for shard, pieces in sorted(by_shard.items()):
            # transformers reads model.safetensors before any index: beside a second file it needs another name.
            target = "model-00001-of-00002.safetensors" if shard == SINGLE_NAME else shard
            if len(by_shard) == 1 and to == PRENORM:
                target = SINGLE_NAME
            unchanged = len(pieces) == in_source[shard] and all(
                piece.make is None and piece.stored == (piece.name,) and tensors[piece.name].shape == piece.shape
                for piece in pieces
            )
            if unchanged:
                copy_file(inside(source, shard), folder / target, link, bar.update)
            else:
                write_pieces(origin.checkpoint, pieces, folder / target, bar.update)
            weight_map.update(dict.fromkeys((piece.name for piece in pieces), target))
    return weight_map


def _write_config(folder: Path, config: AttnResConfig, to: str, engine: str | None, quantised: dict | None):
    if to == ATTNRES:
        write_code(config, folder)
        return
    if to == KIMI_K3:
        content = kimi_k3.write_config(config, engine, quantised)
    else:
        content = {**config.backbone_config.to_diff_dict(), "model_type": config.backbone_config.model_type}
        content.pop("auto_map", None)  # code that is not copied
        if config.dtype is not None:
            content["dtype"] = str(config.dtype).removeprefix("torch.")
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
