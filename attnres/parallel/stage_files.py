"""The stages of a pipelined model on disk: each reads its own tensors and writes its own shard of one checkpoint."""

import json
import shutil
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint_names import OUTPUT_NAMES, PER_LAYER_NAMES, names_in_memory
from ..configuration_attnres import AttnResConfig
from ..conversion.checkpoint import inside
from ..conversion.files import write_index
from ..modeling_attnres import AttnResForCausalLM
from .stage import AttnResStage
from .tensor import whole

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def empty_model(config: AttnResConfig) -> AttnResForCausalLM:
    """Returns the whole model on the meta device, where it needs no memory."""
    with torch.device("meta"):
        return AttnResForCausalLM._from_config(config)


def load_stage(stage: AttnResStage, folder: Path, device: torch.device):
    """Fills a stage on the meta device from a checkpoint folder, reading only the tensors of this stage.

    A plain PreNorm checkpoint has no depth tensors; the depth mixer then starts as it does in
    `AttnResForCausalLM.from_backbone`.
    """
    files = _weight_map(folder)
    own = stage.state_dict()
    own_files = {name: file for name, file in files.items() if _is_of(stage, name)}
    if stage.is_last and stage.config.tie_word_embeddings and HEAD not in files and EMBEDDING in files:
        own_files[EMBEDDING] = files[EMBEDDING]
    stored = {}
    for file in sorted(set(own_files.values())):
        with safe_open(inside(folder, file), framework="pt", device=str(device)) as tensors:
            for name in own_files.keys() & set(tensors.keys()):
                stored[name] = tensors.get_tensor(name).clone()  # safetensors maps the file
    loaded = names_in_memory(stage, stored)
    loaded = {f"model.{name}" if f"model.{name}" in own else name: tensor for name, tensor in loaded.items()}
    if EMBEDDING in loaded and EMBEDDING not in own:
        loaded[HEAD] = loaded.pop(EMBEDDING)
    missing = own.keys() - loaded.keys()
    depth_modules = {*PER_LAYER_NAMES, *OUTPUT_NAMES}
    if not any(name.removesuffix(".weight").rpartition(".")[2] in depth_modules for name in files):
        missing = {name for name in missing if ".depth_mixer." not in name}
    misshapen = [name for name in own.keys() & loaded.keys() if own[name].shape != loaded[name].shape]
    if missing or misshapen:
        names = sorted(missing or misshapen)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"checkpoint {folder} {'lacks' if missing else 'has another shape of'} {', '.join(names[:3])}{more}, "
            f"needed by the stage with decoder layers {stage.route.layers.start} to {stage.route.layers.stop - 1}."
        )
    stage.load_state_dict({name: loaded[name] for name in own if name in loaded}, strict=False, assign=True)
    fill_stage(stage, device, loaded.keys())


def fill_stage(stage: AttnResStage, device: torch.device, loaded: Collection[str] = ()):
    """Allocates the tensors on the meta device and initialises all but the `loaded` ones as the family does."""
    for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
        tensor._is_hf_initialized = name in loaded
    stage._apply(lambda each: torch.empty_like(each, device=device) if each.is_meta else each)  # as `to_empty` does
    stage.initialize_weights()


def _names_on_disk(stage: AttnResStage, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a stage under their names in a checkpoint of the whole model."""
    if stage.is_last and stage.config.tie_word_embeddings:
        state.pop(HEAD)  # the first stage writes the same tensor
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
    """Writes a stage as shard `number`, from 0, of `count`.

    Without a folder, the rank only gives its parts of divided tensors to the rank that writes.

    Returns:
        The file of each tensor, and the number of bytes.
    """
    state = {}
    for name, each in stage.state_dict().items():
        gathered = whole(each.detach())
        if folder is not None:
            state[name] = gathered.cpu()
    if folder is None:
        return {}, 0
    tensors = _names_on_disk(stage, state)
    file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file), sum(tensor.nbytes for tensor in tensors.values())


def start_folder(temporary: Path, config: AttnResConfig, generation_config: GenerationConfig | None):
    """Writes the configurations, and the code that loads them without this package, to a new temporary folder.

    This comes before the shards, because `save_pretrained` deletes shards that it has not written.
    """
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    shell = empty_model(config)
    if generation_config is not None:
        shell.generation_config = generation_config
    shell.save_pretrained(temporary, state_dict={})
    (temporary / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # a file without tensors


def finish_folder(temporary: Path, folder: Path, shards: list[tuple[dict[str, str], int]]):
    """Writes the index of the shards and moves everything to `folder`, replacing the model that is there."""
    weight_map = {name: file for names, _ in shards for name, file in names.items()}
    write_index(temporary, weight_map, sum(size for _, size in shards))
    if not folder.exists():
        temporary.rename(folder)
        return
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    for path in sorted(temporary.iterdir()):
        path.replace(folder / path.name)
    temporary.rmdir()


def _weight_map(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor."""
    index = inside(folder, SAFE_WEIGHTS_INDEX_NAME)
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"checkpoint {folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    with safe_open(inside(folder, SAFE_WEIGHTS_NAME), framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), SAFE_WEIGHTS_NAME)


def _is_of(stage: AttnResStage, name: str) -> bool:
    """Returns whether a tensor on disk is in one of the stage's decoder layers, or outside of all and the stage's."""
    for before, part in pairwise(name.split(".")):
        if before == "layers" and part.isdigit():
            return int(part) in stage.route.layers
    renamed = names_in_memory(stage, {name: torch.empty(0)})
    own = stage.state_dict()
    return any(new in own or f"model.{new}" in own for new in renamed)
