"""The stages of a pipelined model on disk: each reads its own tensors and writes its own file of one checkpoint."""

import json
import os
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint_names import OUTPUT_NAMES, PER_LAYER_NAMES, names_in_memory
from ..configuration_attnres import AttnResConfig
from ..modeling_attnres import AttnResForCausalLM
from .stage import AttnResStage

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"


def empty_model(config: AttnResConfig) -> AttnResForCausalLM:
    """The whole model on the meta device: shapes and modules, no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    try:
        with torch.device("meta"):
            return AttnResForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def load_stage(stage: AttnResStage, folder: Path, device: torch.device):
    """Fills a stage on the meta device from a checkpoint folder, reading only the tensors that are its own.

    Of a plain PreNorm checkpoint, which has no depth tensors, the depth mixer starts as it does in
    `AttnResForCausalLM.from_backbone`.

    Raises:
        ValueError: a tensor of the stage is not there or has another shape.
    """
    files = _weight_map(folder)
    own = stage.state_dict()
    own_files = {name: file for name, file in files.items() if _is_of(stage, name)}
    if stage.is_last and stage.config.tie_word_embeddings and HEAD not in files and EMBEDDING in files:
        own_files[EMBEDDING] = files[EMBEDDING]
    stored = {}
    for file in sorted(set(own_files.values())):
        with safe_open(folder / file, framework="pt", device=str(device)) as tensors:
            for name in own_files.keys() & set(tensors.keys()):
                stored[name] = tensors.get_tensor(name).clone()  # safetensors maps the file
    loaded = names_in_memory(stage, stored)
    loaded = {f"model.{name}" if f"model.{name}" in own else name: tensor for name, tensor in loaded.items()}
    if EMBEDDING in loaded and EMBEDDING not in own:
        loaded[HEAD] = loaded.pop(EMBEDDING)
    missing = own.keys() - loaded.keys()
    if not any(_is_depth_tensor(name) for name in files):  # the lossless start
        missing = {name for name in missing if ".depth_mixer." not in name}
    misshapen = [name for name in own.keys() & loaded.keys() if own[name].shape != loaded[name].shape]
    if missing or misshapen:
        problem = f"has no {_some(missing)}" if missing else f"has another shape of {_some(misshapen)}"
        raise ValueError(
            f"checkpoint {folder} {problem}, which decoder layers {stage.route.layers.start} to "
            f"{stage.route.layers.stop - 1} of this {stage.config.backbone_config.model_type} model need."
        )
    stage.load_state_dict({name: loaded[name] for name in own if name in loaded}, strict=False, assign=True)
    fill_stage(stage, device, set(loaded))


def fill_stage(stage: AttnResStage, device: torch.device, loaded: Iterable[str] = ()):
    """Makes what is on the meta device real and initialises it as the family does; `loaded` stays as it is."""
    for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
        tensor._is_hf_initialized = name in loaded
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
                setattr(module, name, real)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    stage.initialize_weights()


def whole_state(stage: AttnResStage, keep: bool) -> dict[str, torch.Tensor]:
    """The tensors of a stage, in host memory; all ranks that divide it call this, and only some keep them."""
    state = {}
    for name, each in stage.state_dict().items():
        whole = each.full_tensor() if isinstance(each, DTensor) else each
        if keep:
            state[name] = whole.detach().cpu()
    return state


def names_on_disk(stage: AttnResStage, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a stage under the names that they have in a checkpoint of the whole model.

    Args:
        stage: its modules say how tensors were converted.
        state: as `whole_state` gives it; used up.
    """
    if stage.is_last and stage.config.tie_word_embeddings:
        state.pop(HEAD)  # the first stage has the same
    depth = {name: state.pop(name) for name in list(state) if ".depth_mixer." in name}
    named = dict(revert_weight_conversion(stage, state))
    mixer = "model.depth_mixer."
    for on_disk, in_memory in PER_LAYER_NAMES.items():
        rows = depth.get(mixer + in_memory, ())
        for layer, row in zip(stage.route.layers, rows, strict=bool(len(rows))):
            named[f"model.layers.{layer}.{on_disk}.weight"] = row
    for on_disk, in_memory in OUTPUT_NAMES.items():
        if mixer + in_memory in depth:
            named[f"model.{on_disk}.weight"] = depth[mixer + in_memory]
    return {name: tensor.contiguous() for name, tensor in named.items()}


def write_shard(stage: AttnResStage, folder: Path | None, number: int, count: int) -> tuple[dict[str, str], int]:
    """Writes a stage as shard `number`, from 0, of `count`; returns which tensor is in which file, and the bytes.

    Without a folder the rank only gives its part of the tensors to the one that writes.
    """
    state = whole_state(stage, keep=folder is not None)
    if folder is None:
        return {}, 0
    tensors = names_on_disk(stage, state)
    file = SHARD.format(number=number + 1, count=count)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file), sum(tensor.nbytes for tensor in tensors.values())


def start_folder(folder: Path, config: AttnResConfig, generation_config: GenerationConfig | None) -> Path:
    """A temporary folder beside `folder` with configurations, and the code that loads them without this package.

    Before the shards: transformers' saving removes those that it has not written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shell = empty_model(config)
    if generation_config is not None:
        shell.generation_config = generation_config
    try:
        shell.save_pretrained(temporary, state_dict={})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    (temporary / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # without a tensor
    return temporary


def finish_folder(temporary: Path, folder: Path, shards: list[tuple[dict[str, str], int]]):
    """Writes the index of the shards, and gives the folder its name; files of the same name are replaced."""
    weight_map = {name: file for names, _ in shards for name, file in names.items()}
    index = {
        "metadata": {"total_size": sum(size for _, size in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (temporary / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    if not folder.exists():
        temporary.rename(folder)
        return
    for path in folder.glob("model*.safetensors*"):  # of a model that is replaced
        path.unlink()
    for path in sorted(temporary.iterdir()):
        path.replace(folder / path.name)
    temporary.rmdir()


def stored_generation_config(folder: Path) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG_NAME).is_file() else None


def _weight_map(folder: Path) -> dict[str, str]:
    """Which tensor is in which file."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder}: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME} there.")
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), SAFE_WEIGHTS_NAME)


def _is_of(stage: AttnResStage, name: str) -> bool:
    """Whether a tensor on disk is one of the stage's: of its decoder layers, or outside of all and known to it."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before == "layers" and part.isdigit():
            return int(part) in stage.route.layers
    renamed = names_in_memory(stage, {name: torch.empty(0)})
    own = stage.state_dict()
    return any(new in own or f"model.{new}" in own for new in renamed)


def _is_depth_tensor(name: str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return module in PER_LAYER_NAMES or module in OUTPUT_NAMES


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
