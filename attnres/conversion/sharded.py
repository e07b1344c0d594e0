"""Joins the shards that FSDP saved (`torch.distributed.checkpoint`) to a folder for `from_pretrained`.

`accelerate merge-weights` keeps the names that tensors have in memory, writes no configuration, and unpickles the
metadata without restrictions. Here only the classes that describe tensors are unpickled, and the result is what
`save_pretrained` writes.
"""

import os
import pickle
import warnings
from pathlib import Path, PurePosixPath

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata
from transformers import initialization as init

from ..configuration_attnres import AttnResConfig
from ..messages import one_line
from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CONFIG_NAME, CheckpointError, inside, read_json
from .files import write_companions
from .structure import check_tensors

METADATA_NAME = ".metadata"
SHARDS_NAME = "pytorch_model_fsdp_0"  # accelerate's name of the model's folder in a checkpoint

_METADATA = "torch.distributed.checkpoint.metadata"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Everything that the metadata of tensors consists of.
UNPICKLED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in _DTYPES),
}
PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}


def find_shards(folder: str | os.PathLike) -> Path | None:
    """Returns the folder with the shards, which is `folder` or the one in a Trainer's checkpoint; None without any."""
    for candidate in (Path(folder), Path(folder) / SHARDS_NAME):
        if (candidate / METADATA_NAME).is_file():
            return candidate
    return None


def join_shards(source: Path, folder: Path) -> AttnResConfig:
    """Writes the model as `save_pretrained` would; needs memory for the whole model.

    Args:
        source: a Trainer's checkpoint, or the folder of shards in it. `config.json` and the tokenizer are searched for
            in the folder of shards and in the two folders above.
        folder: an empty folder.

    Returns:
        The model's configuration.
    """
    shards = find_shards(source)
    homes = (shards, shards.resolve().parent, shards.resolve().parent.parent)
    home = next((each for each in homes if (each / CONFIG_NAME).is_file()), None)
    if home is None:
        raise CheckpointError(
            f"{shards}: there is no {CONFIG_NAME} there or in the two folders above; save it beside the shards with "
            "model.config.save_pretrained(folder), and the tokenizer's files with it."
        )
    metadata = read_metadata(shards)
    path = inside(home, CONFIG_NAME)
    content = read_json(path)
    if content.get("model_type") != AttnResConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type must be {AttnResConfig.model_type!r}, got {content.get('model_type')!r}; join the "
            "shards of other models with accelerate merge-weights."
        )
    with torch.device("meta"), init.no_init_weights():
        model = AttnResForCausalLM(AttnResConfig.from_dict(content))
    model.load_state_dict(_load(shards, metadata, model), strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    write_companions(home, folder)
    return model.config


def read_metadata(shards: Path) -> Metadata:
    """Reads the description of the saved tensors."""
    path = inside(shards, METADATA_NAME)
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, path).load()
        for entry in metadata.storage_data.values():
            inside(shards, entry.relative_path)
        names = metadata.state_dict_metadata.items()
        opaque = sorted(name for name, tensor in names if not isinstance(tensor, TensorStorageMetadata))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle leads to errors of any type
        raise CheckpointError(f"{path}: not the metadata of a sharded save ({one_line(error)}).") from None
    if opaque:
        raise CheckpointError(
            f"{path}: {opaque[0]} is not a tensor but an object that would have to be unpickled; name the folder with "
            f"the model's shards ({SHARDS_NAME}), not that of the optimizer."
        )
    return metadata


class _Unpickler(pickle.Unpickler):
    """Unpickles `UNPICKLED` only; paths, which say where the save once was, become pure paths."""

    def __init__(self, file, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str):
        if (module, name) in PATHS:
            return PurePosixPath
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.0 to 3.11.3 pickle enumeration members like this
            return lambda kind, member: _MEM_FORMAT_ENCODING[member]
        if (module, name) not in UNPICKLED:
            raise CheckpointError(
                f"{self.path}: names {module}.{name}, which is not part of the metadata of tensors. A pickle can run "
                "code; this one is not opened."
            )
        return super().find_class(module, name)


def _load(shards: Path, metadata: Metadata, model: AttnResForCausalLM) -> dict[str, torch.Tensor]:
    """Loads the model's tensors under their names in memory; in the save, all of them may be under `model.`."""
    stored, wanted = metadata.state_dict_metadata, model.state_dict()
    prefix = "model." if f"model.{next(iter(wanted))}" in stored else ""
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name.removeprefix(prefix): tuple(each.size) for name, each in stored.items()}
    check_tensors(shards, expected, found, set(model.all_tied_weights_keys))
    state = {}
    for name, each in stored.items():
        dtype = each.properties.dtype
        # What no shard covers stays NaN.
        state[name] = torch.full(each.size, torch.nan if dtype.is_floating_point else 0, dtype=dtype)
    reader = dcp.FileSystemReader(shards)
    reader.read_metadata = lambda *args, **kwargs: metadata  # instead of unpickling it again, without restrictions
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # a damaged shard leads to errors of any type
        if isinstance(error, dcp.CheckpointException):
            ((error, _),) = error.failures.values()  # of the one process
        raise CheckpointError(
            f"{shards}: a shard cannot be read ({one_line(error)}); check that the save is complete."
        ) from None
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{shards}: {name} is NaN, or the shards do not cover it.")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
