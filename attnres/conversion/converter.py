"""Converting a checkpoint folder without loading the model.

Weight shards are copied unchanged; what changes is the configuration, the index and one small shard with the
depth tensors. Only where a name or a shape differs between layouts is a shard's header rewritten, never its data.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_attnres import DEPTH_OPTIONS, AttnResConfig
from ..depth_variants import VARIANTS
from ..folders import replaced_folder
from ..modeling_attnres import AUTO_MAP, AttnResForCausalLM
from . import kimi_k3
from .checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, CheckpointError, inside, read_checkpoint
from .companions import write_companions
from .files import copy_file
from .layouts import (
    ATTNRES,
    KIMI_K3,
    PRENORM,
    VARIANT_NAME,
    Source,
    depth_names,
    stack_layers,
    stacked_names,
    to_prenorm,
    understand,
)
from .pieces import TORCH_DTYPES, Piece, write_pieces
from .sharded import find_shards, join_shards
from .structure import check_structure

DEPTH_SHARD = "model-depth.safetensors"
SHARDS = "shards"  # what a run that FSDP sharded has saved


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        source, result: the folders.
        from_layout, to_layout: `prenorm`, `attnres` or `kimi-k3`; from `shards` of a model of the same layout.
        shards, bytes: weight files written and their size, depth shard included.
        depth: what the result mixes over depth, in words.
        left_out: tensors of other parts of a multimodal checkpoint, which did not come along.
        report: content of `conversion_report.json`, None with `verify="none"`.
    """

    source: Path
    result: Path
    from_layout: str
    to_layout: str
    shards: int
    bytes: int
    depth: str
    left_out: list[str]
    report: dict | None = None


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
    """Converts a checkpoint folder; `result` appears when everything is done and checked, or not at all.

    Args:
        source: folder with safetensors weights, or with the shards that FSDP saved. It is not changed.
        result: folder to make.
        to: `"attnres"` (default), `"prenorm"` or `"kimi-k3"`.
        from_layout: what `source` is taken for; by default its configuration says.
        verify: `"auto"`, `"full"` or `"none"`, see `verification.verify_conversion`.
        link: hard links instead of copies of unchanged shards: fast, but saving over the result changes the source.
        overwrite: replace an existing `result` once the new one is complete.
        reinit_depth: start with new (zero) pseudo-queries where trained ones do not fit the new depth options.
        keep_packed: leave MXFP4 weights as they are, instead of writing them in bfloat16. Such a folder holds a
            checkpoint and is not loaded; nothing is verified, as nothing is computed anew.
        engine: which engine is to load the result: with `to="kimi-k3"` `"llama.cpp"`, `"vllm"`, `"sglang"` or `"mlx"`,
            otherwise `"vllm"`, by transformers' own code.
        progress: show a bar on stderr.
        depth_options: `residual_mode`, `layers_per_block`, `num_blocks`, `depth_variant`, `scale_norm_eps` of the
            result.

    Raises:
        CheckpointError: the source cannot be read or not be converted, with the reason.
        OSError: files cannot be written.
    """
    source, result = Path(source), Path(result)
    _check_places(source, result)
    if find_shards(source):
        others = {"to": to not in (None, ATTNRES), "from_layout": from_layout, "link": link}
        others = {**others, "reinit_depth": reinit_depth, "for": engine, "keep_packed": keep_packed, **depth_options}
        return _join(source, result, overwrite, progress, others)
    origin = understand(read_checkpoint(source), from_layout)
    to = ATTNRES if to is None else to
    if engine is not None and to != KIMI_K3 and (to, engine) != (ATTNRES, "vllm"):
        raise CheckpointError(
            f"--for {engine} needs --to kimi-k3, got {to}; only vllm runs other layouts, by transformers' own code."
        )
    keep_packed = keep_packed and bool(origin.packed)
    quantised = kimi_k3.quantisation(origin.checkpoint.config) if keep_packed else None
    config = _result_config(origin, to, depth_options, engine)
    if quantised is not None:
        config.quantization_config = quantised
    check_structure(origin)
    new_depth = _depth_change(origin, config, to, reinit_depth)
    plan = _plan_shards(origin, to, new_depth is not None, keep_packed, engine)
    depth_tensors = _depth_tensors(origin, config) if new_depth == "zero" else {}
    if to == ATTNRES and engine is not None and depth_tensors:
        stacked = stacked_names(config.num_hidden_layers)
        depth_tensors = {
            target: stack_layers(*(depth_tensors[name] for name in names)) for target, names in stacked.items()
        }
    if to == KIMI_K3 and kimi_k3.is_multimodal(config.backbone_config, engine):
        depth_tensors = {kimi_k3.PREFIX + name: tensor for name, tensor in depth_tensors.items()}
    _check_space(result, plan, link)

    with replaced_folder(result, overwrite) as folder:
        weight_map = _write_shards(origin, plan, folder, link, progress)
        if depth_tensors:
            name = DEPTH_SHARD if len(plan) > 1 else "model-00002-of-00002.safetensors"
            save_file(depth_tensors, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(depth_tensors, name))
        _write_index(folder, weight_map)
        if depth_tensors:
            shutil.copymode(folder / INDEX_NAME, folder / name)  # safetensors writes for the owner only
        write_companions(origin.checkpoint.folder, folder)
        _write_config(folder, config, to, engine, quantised)
        written = read_checkpoint(folder)
        outcome = Conversion(
            source,
            result,
            origin.layout,
            to,
            len(written.shards),
            written.bytes,
            _depth_text(config, to),
            origin.left_out,
        )
        if verify != "none" and not keep_packed:
            from .verification import verify_conversion  # loads models: only who verifies pays for it

            outcome.report = verify_conversion(origin, understand(written), verify, progress, new_depth == "zero")
            (folder / "conversion_report.json").write_text(json.dumps(outcome.report, indent=2) + "\n")
    return outcome


def _join(source: Path, result: Path, overwrite: bool, progress: bool, others: dict) -> Conversion:
    """Shards of a run as one checkpoint: the same model, so there is nothing to verify and nothing to choose."""
    given = [name for name, value in others.items() if value]
    if given:
        raise CheckpointError(
            f"{source}: holds the shards of a run, and {given[0]} is for whole checkpoints. Join them first, without "
            "options, then convert the result."
        )
    with replaced_folder(result, overwrite) as folder:
        config = join_shards(source, folder, progress)
        written = read_checkpoint(folder)
        depth = _depth_text(config, ATTNRES)
        return Conversion(source, result, SHARDS, ATTNRES, len(written.shards), written.bytes, depth, [])


def _depth_text(config: AttnResConfig, to: str) -> str:
    if to == PRENORM or config.residual_mode == "standard":
        return "plain residuals"
    if config.residual_mode == "full":
        return f"full: {config.num_sublayers} sublayers"
    return f"{config.num_blocks} blocks of {config.layers_per_block} decoder layers"


def _check_places(source: Path, result: Path):
    inner, outer = result.resolve(), source.resolve()
    if inner == outer or inner.is_relative_to(outer):
        raise CheckpointError(f"{result}: the result must not be the source or inside it.")
    if outer.is_relative_to(inner):
        raise CheckpointError(f"{result}: the source {source} is inside the result; nothing of it must be replaced.")


def _result_config(origin: Source, to: str, depth_options: dict, engine: str | None) -> AttnResConfig:
    options = {key: value for key, value in depth_options.items() if value is not None}
    unknown = set(options) - set(DEPTH_OPTIONS)
    if unknown:
        raise TypeError(f"convert got an unexpected option {sorted(unknown)[0]!r}")
    if to != ATTNRES and (options.get("depth_variant") or origin.config.depth_variant) != "attnres":
        raise CheckpointError(f"--to {to} has no depth_variant {origin.config.depth_variant!r}: only 'attnres'.")
    if to == PRENORM and options:
        raise CheckpointError(f"{sorted(options)[0]} is an option of an AttnRes result; --to {to} takes none.")
    content = origin.config.to_dict()
    if "num_blocks" in options and "layers_per_block" not in options:
        content.pop("layers_per_block")
    config = AttnResConfig.from_dict({**content, **options})
    if to == KIMI_K3:
        kimi_k3.write_config(config, engine)  # refuses what that layout cannot say before anything is written
    return config


def _depth_change(origin: Source, config: AttnResConfig, to: str, reinit_depth: bool) -> str | None:
    """`"zero"`: new depth tensors, `"drop"`: none, None: those of the source stay."""
    present = origin.depth_names & set(origin.stored_names)
    has_depth = origin.layout != PRENORM and origin.config.residual_mode != "standard"
    wants_depth = to != PRENORM and config.residual_mode != "standard"
    if not has_depth:
        return "zero" if wants_depth else "drop" if present else None
    zero = depth_is_zero(origin)
    if not wants_depth:
        if not zero:
            raise CheckpointError(
                f"{origin.checkpoint.folder}: has trained pseudo-queries, so no model with plain residuals computes "
                "what it computes."
            )
        return "drop"
    old, new = origin.config, config
    same = (old.residual_mode, old.depth_variant) == (new.residual_mode, new.depth_variant) and (
        new.residual_mode == "full" or old.layers_per_block == new.layers_per_block
    )
    if same and not reinit_depth:
        return None
    if not zero and not reinit_depth:
        raise CheckpointError(
            f"{origin.checkpoint.folder}: its pseudo-queries are trained for residual_mode={old.residual_mode}, "
            f"layers_per_block={old.layers_per_block}; other depth options need --reinit-depth, which starts them "
            "at zero."
        )
    return "zero" if reinit_depth or old.depth_variant != new.depth_variant else None


def depth_is_zero(origin: Source) -> bool:
    """Whether all depth tensors are those of the start, pseudo-queries exactly zero; NaN or Inf in them is an error."""
    zero = True
    by_shard: dict[str, list[str]] = {}
    for name in sorted(origin.depth_names):
        if name not in origin.stored_names:
            raise CheckpointError(f"{origin.checkpoint.folder}: lacks depth tensor {name}.")
        by_shard.setdefault(origin.tensor(name).shard, []).append(name)
    for shard, names in by_shard.items():
        with safe_open(inside(origin.checkpoint.folder, shard), "pt") as file:
            for name in names:
                tensor = file.get_tensor(origin.stored_names[name])
                if not torch.isfinite(tensor.float()).all():
                    raise CheckpointError(f"{origin.checkpoint.folder}: depth tensor {name} has NaN or Inf.")
                if name == VARIANT_NAME:
                    zero = zero and torch.equal(tensor, _initial_extras(origin.config).to(tensor.dtype))
                zero = zero and not (name.endswith("_res_proj.weight") and tensor.any())
    return zero


@dataclass(frozen=True)
class PlannedShard:
    """A weight file of the result: of which file of the source, and its tensors."""

    source: str
    target: str
    pieces: list[Piece]
    unchanged: bool

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


def _plan_shards(
    origin: Source, to: str, drop_depth: bool, keep_packed: bool, engine: str | None
) -> list[PlannedShard]:
    tensors = origin.checkpoint.tensors
    dropped = origin.depth_names if drop_depth else set()
    by_shard: dict[str, list[Piece]] = {shard: [] for shard in origin.checkpoint.shards}
    for piece in origin.pieces(to, keep_packed, engine, dropped):
        by_shard[tensors[piece.stored[0]].shard].append(piece)
    kept = {shard: pieces for shard, pieces in by_shard.items() if pieces}
    in_source = dict.fromkeys(origin.checkpoint.shards, 0)
    for tensor in tensors.values():
        in_source[tensor.shard] += 1
    plan = []
    for shard, pieces in kept.items():
        unchanged = len(pieces) == in_source[shard] and all(
            piece.make is None and piece.stored == (piece.name,) and tensors[piece.name].shape == piece.shape
            for piece in pieces
        )
        # transformers reads model.safetensors before any index: beside a second shard it needs another name.
        single = len(kept) == 1
        alone = single and to == PRENORM
        target = SINGLE_NAME if alone else "model-00001-of-00002.safetensors" if shard == SINGLE_NAME else shard
        plan.append(PlannedShard(shard, target, pieces, unchanged))
    return plan


def _check_space(result: Path, plan: list[PlannedShard], link: bool):
    needed = sum(shard.bytes for shard in plan if not (link and shard.unchanged))
    parent = next(path for path in (result, *result.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    # Where blocks are shared a copy needs no space, so this only refuses what cannot work without sharing either.
    if needed > free and not link:
        raise CheckpointError(
            f"{parent}: no space left, {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free. Free some, "
            "or use --link."
        )


def _write_shards(origin: Source, plan: list[PlannedShard], folder: Path, link: bool, progress: bool) -> dict[str, str]:
    weight_map = {}
    with tqdm(
        total=sum(shard.bytes for shard in plan), unit="B", unit_scale=True, desc="weights", disable=not progress
    ) as bar:
        for shard in plan:
            if shard.unchanged:
                copy_file(inside(origin.checkpoint.folder, shard.source), folder / shard.target, link, bar.update)
            else:
                write_pieces(origin.checkpoint, shard.pieces, folder / shard.target, bar.update)
            weight_map.update({piece.name: shard.target for piece in shard.pieces})
    return weight_map


def _depth_tensors(origin: Source, config: AttnResConfig) -> dict[str, torch.Tensor]:
    """Depth tensors of a lossless start, in the dtype of the weights: zero pseudo-queries, unit gains."""
    dtype = TORCH_DTYPES[origin.checkpoint.float_dtype]
    tensors = {
        name: torch.zeros(1, config.hidden_size, dtype=dtype)
        if name.endswith("_res_proj.weight")
        else torch.ones(config.hidden_size, dtype=dtype)
        for name in sorted(depth_names(config.num_hidden_layers))
    }
    extras = _initial_extras(config)
    return tensors if extras is None else {**tensors, VARIANT_NAME: extras.to(dtype)}


def _initial_extras(config: AttnResConfig) -> torch.Tensor | None:
    initial = VARIANTS[config.depth_variant].initial
    return None if initial is None else initial(config.num_sublayers + 1, config.hidden_size)


def _write_index(folder: Path, weight_map: dict[str, str]):
    if set(weight_map.values()) == {SINGLE_NAME}:
        return
    size = sum((folder / shard).stat().st_size for shard in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(folder: Path, config: AttnResConfig, to: str, engine: str | None, quantised: dict | None):
    if to == ATTNRES:
        config.architectures = [AttnResForCausalLM.__name__]
        # Saves the code that the folder needs as remote code; the configuration gets all classes.
        config.auto_map = dict(AUTO_MAP)
        custom_object_save(AttnResForCausalLM, folder)
        config.save_pretrained(folder)
        return
    content = kimi_k3.write_config(config, engine, quantised) if to == KIMI_K3 else to_prenorm(config)
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


__all__ = ["Conversion", "convert"]
