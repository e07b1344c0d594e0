"""Reads a checkpoint folder without its weights: `config.json`, the index, and the headers of the safetensors files.

The folder is untrusted: a file name in it must not lead out of the folder, pickles are not opened, and safetensors
checks every header against its file.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..messages import one_line

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 256 * 2**20  # an index of a million tensors is far below this


class CheckpointError(ValueError):
    """A checkpoint cannot be read or converted; the message names the file, what is wrong with it, and what to do."""


class TensorInfo(NamedTuple):
    """A tensor's file in the folder and, from the header, its dtype ("BF16", "F32", ...) and shape."""

    shard: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """The content of a checkpoint folder: its `config.json`, its tensors by name, and its weight files, sorted."""

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Returns the total size of the weight files."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @property
    def float_dtype(self) -> str:
        """Returns the floating-point dtype of most elements, which new depth tensors get; BF16 if there is none."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in ("BF16", "F16", "F32"):
                counts[tensor.dtype] += prod(tensor.shape)
        return max(counts, key=counts.get) if counts else "BF16"

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor by its name on disk."""
        with safe_open(inside(self.folder, self.tensors[name].shard), "pt") as file:
            return file.get_tensor(name)


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a tensor; the dtype is named as in safetensors headers, which hold the bits ("F8_E4M3")."""
    bits = 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])
    return prod(shape) * bits // 8


def read_json(path: Path) -> dict:
    """Reads the JSON object in a file of a checkpoint."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES} bytes, so it is no JSON file of a checkpoint.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)}); fetch the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(content).__name__}.")
    return content


def read_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Reads the configuration and all headers of a checkpoint folder, and checks them against each other.

    Raises:
        CheckpointError: a file is missing, damaged or not safe to read, or the index contradicts the headers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    config_path = inside(folder, CONFIG_NAME)
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG_NAME}, so it is not a transformers checkpoint.")
    checkpoint = Checkpoint(folder, read_json(config_path))
    weight_map = _weight_map(folder)
    checkpoint.shards = sorted(set(weight_map.values())) or [SINGLE_NAME]
    for shard in checkpoint.shards:
        for name, tensor in _read_header(folder, shard).items():
            if name in checkpoint.tensors:
                other = checkpoint.tensors[name].shard
                raise CheckpointError(f"{folder}: tensor {name!r} is in {other} and in {shard}; fetch both again.")
            checkpoint.tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].shard != shard:
            raise CheckpointError(
                f"{folder / INDEX_NAME}: says that {shard} has tensor {name!r}, but it does not; fetch both again."
            )
    return checkpoint


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file that a checkpoint names.

    Raises:
        CheckpointError: the name is not that of a file directly in the folder, or the file is a symbolic link to
            something that is neither in the folder nor among the blobs of its Hub cache.
    """
    if not isinstance(name, str) or not name or "\x00" in name or Path(name).name != name or name == "..":
        raise CheckpointError(
            f"{folder}: names the file {str(name)[:200]!r}, which is not a plain file name in the folder."
        )
    path = folder / name
    if path.is_symlink():
        target = path.resolve()
        blobs = folder.resolve().parent.parent / "blobs"
        if not target.is_relative_to(folder.resolve()) and not target.is_relative_to(blobs):
            raise CheckpointError(f"{path}: is a link that leads out of the folder to {target}; copy the file instead.")
    return path


def _read_header(folder: Path, shard: str) -> dict[str, TensorInfo]:
    path = inside(folder, shard)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing weight file; fetch it again.")
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(shard, str(each.get_dtype()), tuple(each.get_shape())) for name, each in slices.items()
            }
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({one_line(error)}); fetch it again.") from None


def _weight_map(folder: Path) -> dict[str, str]:
    """Returns the file of every tensor according to the index; an empty dict for a single file, which has no index."""
    path = inside(folder, INDEX_NAME)
    has_index, has_single = path.is_file(), inside(folder, SINGLE_NAME).is_file()
    if has_index and has_single:
        raise CheckpointError(
            f"{folder}: has both {SINGLE_NAME}, which transformers reads, and {INDEX_NAME}, which it then ignores; "
            "remove the one that is stale."
        )
    if has_single:
        return {}
    if not has_index:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: pickle checkpoints can run code and are not opened; if you trust it, convert "
                "it with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
            )
        raise CheckpointError(f"{folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}.")
    weight_map = read_json(path).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not is_map or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that maps tensor names to file names.")
    for shard in sorted(set(weight_map.values())):
        if not inside(folder, shard).name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names {shard!r}; only .safetensors files are read.")
    return weight_map
