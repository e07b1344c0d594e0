"""Reading a checkpoint folder without its weights: configuration, index, safetensors headers.

Everything in a folder is untrusted: no name in an index may leave the folder, no pickle is opened, and a header is
believed only after safetensors has checked it against its file.
"""

import json
import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 256 * 2**20  # an index of a million tensors is far below this

# Bits per element, by the names in safetensors headers.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read; the message names the file, what is wrong with it, and the fix."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        shard: file name inside the folder.
        dtype: as in the header ("BF16", "F32", ...).
        shape: dimensions.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BITS.get(self.dtype, 8) // 8


@dataclass
class Checkpoint:
    """A checkpoint folder: what its configuration, index and headers say.

    Attributes:
        folder: where it is.
        config: content of `config.json`.
        tensors: by name, in no particular order.
        shards: names of the weight files, sorted.
    """

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @property
    def float_dtype(self) -> str:
        """The floating dtype that most elements have, as headers name it; that of new depth tensors."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in ("BF16", "F16", "F32"):
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
        return max(counts, key=counts.get) if counts else "BF16"


def read_json(path: Path) -> dict:
    """The JSON object in a file of a checkpoint."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file of a checkpoint.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({_line(error)}). Fetch the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(content).__name__}.")
    return content


def read_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """The checkpoint in a folder, every header checked, no weight read.

    Raises:
        CheckpointError: what is missing or wrong, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    config_path = inside(folder, CONFIG_NAME)
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG_NAME}, so it is not a transformers checkpoint.")
    checkpoint = Checkpoint(folder, read_json(config_path))
    weight_map = _weight_map(folder)
    if weight_map is None:
        checkpoint.shards = [SINGLE_NAME]
    else:
        checkpoint.shards = sorted(set(weight_map.values()))
    for shard in checkpoint.shards:
        for name, tensor in read_header(folder, shard).items():
            if name in checkpoint.tensors:
                raise CheckpointError(f"{folder}: tensor {name} is in {checkpoint.tensors[name].shard} and in {shard}.")
            checkpoint.tensors[name] = tensor
    if weight_map is not None:
        for name, shard in weight_map.items():
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{folder / shard}: lacks tensor {name}, which {INDEX_NAME} says it has.")
            if checkpoint.tensors[name].shard != shard:
                raise CheckpointError(
                    f"{folder / INDEX_NAME}: puts tensor {name} in {shard}, it is in {checkpoint.tensors[name].shard}."
                )
    return checkpoint


def read_header(folder: Path, shard: str) -> dict[str, TensorInfo]:
    """The tensors of one weight file, by name."""
    path = inside(folder, shard)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing weight file; fetch it again.")
    try:
        with safe_open(path, "numpy") as file:
            return {
                name: TensorInfo(shard, str(piece.get_dtype()), tuple(piece.get_shape()))
                for name, piece in ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
            }
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({_line(error)}). Fetch it again; a download may have broken off."
        ) from None


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a checkpoint names, which must be in the checkpoint's own folder.

    A symbolic link may lead to another place in the folder or into the blobs of its hub cache, nowhere else.
    """
    if not isinstance(name, str) or not name or "\x00" in name or Path(name).name != name or name in (".", ".."):
        raise CheckpointError(
            f"{folder}: names the file {str(name)[:200]!r}, which is not a plain file name in the folder."
        )
    path = folder / name
    if path.is_symlink():
        target = path.resolve()
        blobs = folder.resolve().parent.parent / "blobs"
        if not target.is_relative_to(folder.resolve()) and not target.is_relative_to(blobs):
            raise CheckpointError(f"{path}: is a link that leads out of the folder, to {target}.")
    return path


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name by the index; None for a single file."""
    index_path = inside(folder, INDEX_NAME)
    if index_path.is_file() and inside(folder, SINGLE_NAME).is_file():
        raise CheckpointError(
            f"{folder}: has both {SINGLE_NAME}, which transformers reads, and {INDEX_NAME}, which it then ignores; "
            "one of the two is stale. Remove it."
        )
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: weight_map must be an object of tensor names and file names.")
        for shard in {str(shard): shard for shard in weight_map.values()}.values():
            inside(folder, shard)
            if not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index_path}: names {shard[:200]!r}; only .safetensors files are read.")
        return weight_map
    if inside(folder, SINGLE_NAME).is_file():
        return None
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: pickle checkpoints can run code and are not opened. Convert it to safetensors "
            "where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise CheckpointError(f"{folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}.")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
