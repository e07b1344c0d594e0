"""Builds a from_pretrained folder from FSDP's sharded checkpoints (`torch.distributed.checkpoint`).

`accelerate merge-weights` writes the names that tensors have in memory, no configuration, and opens the metadata, a
pickle, as it is. Here nothing but the classes that metadata of tensors consists of is unpickled, and the result is what
`save_pretrained` writes.
"""

import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata
from tqdm import tqdm
from transformers import initialization as init

from ..configuration_attnres import AttnResConfig
from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CONFIG_NAME, CheckpointError, inside, read_json
from .companions import write_companions

METADATA_NAME = ".metadata"
SHARDS_NAME = "pytorch_model_fsdp_0"  # what accelerate calls the model's folder in a checkpoint

_METADATA = "torch.distributed.checkpoint.metadata"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# All that the metadata of tensors consists of. Paths say where the save once was; none is needed.
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
    """The folder with the shards, `folder` itself or the one in a Trainer's checkpoint; None if there is none."""
    for candidate in (Path(folder), Path(folder) / SHARDS_NAME):
        if (candidate / METADATA_NAME).is_file():
            return candidate
    return None


def join_shards(source: Path, folder: Path, progress: bool) -> AttnResConfig:
    """Writes a model that is saved in shards as `save_pretrained` would; needs memory for the whole model.

    Args:
        source: a Trainer's checkpoint, or the folder of shards in it. `config.json` and the tokenizer are looked for
            there and in the two folders above.
        folder: an empty folder.
        progress: show a bar on stderr.

    Returns:
        The model's configuration.

    Raises:
        CheckpointError: what is missing or wrong, in one line.
    """
    shards = find_shards(source)
    home = _home(shards)
    metadata = read_metadata(shards)
    with torch.device("meta"), init.no_init_weights():
        model = AttnResForCausalLM(_config(home))
    state = _load(shards, metadata, _stored_names(shards, metadata, model), progress)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    write_companions(home, folder)
    return model.config


def read_metadata(shards: Path) -> Metadata:
    """What the save says of its tensors, with everything that is not needed for that refused."""
    path = inside(shards, METADATA_NAME)
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, path).load()
        for entry in metadata.storage_data.values():
            inside(shards, entry.relative_path)
            if entry.transform_descriptors:
                raise CheckpointError(f"{path}: has shards in the form {entry.transform_descriptors}; only plain ones.")
        names = metadata.state_dict_metadata.items()
        opaque = sorted(name for name, tensor in names if not isinstance(tensor, TensorStorageMetadata))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        raise CheckpointError(f"{path}: not the metadata of a sharded save ({_line(error)}).") from None
    if opaque:
        raise CheckpointError(
            f"{path}: {opaque[0]} is an object and no tensor, which would have to be unpickled. Name the folder with "
            f"the model's shards ({SHARDS_NAME}), not that of the optimizer."
        )
    return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str):
        if (module, name) in PATHS:
            return PurePosixPath
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 write the member of an enumeration
            return self._memory_format
        if (module, name) not in UNPICKLED:
            raise self._refusal(f"{module}.{name}")
        return super().find_class(module, name)

    def _memory_format(self, kind: type, name: str) -> _MEM_FORMAT_ENCODING:
        if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
            raise self._refusal("builtins.getattr")
        return kind[name]

    def _refusal(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: names {name}, which metadata of tensors does not consist of. A pickle can run code; this "
            "one is not opened."
        )


class _Reader(dcp.FileSystemReader):
    """Reads shards by metadata that was read before."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.metadata


def _home(shards: Path) -> Path:
    folders = (shards, shards.resolve().parent, shards.resolve().parent.parent)
    for folder in folders:
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise CheckpointError(
        f"{shards}: there is no {CONFIG_NAME} there or in the two folders above. Save it beside the shards: "
        "model.config.save_pretrained(folder), and the tokenizer's files with it."
    )


def _config(home: Path) -> AttnResConfig:
    path = inside(home, CONFIG_NAME)
    content = read_json(path)
    if content.get("model_type") != AttnResConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {content.get('model_type')!r}, not {AttnResConfig.model_type!r}. "
            "accelerate merge-weights joins the shards of other models."
        )
    return AttnResConfig.from_dict(content)


def _stored_names(shards: Path, metadata: Metadata, model: AttnResForCausalLM) -> dict[str, str]:
    """The name of each of the model's tensors in the save, which may put all under `model.`."""
    stored, wanted = metadata.state_dict_metadata, model.state_dict()
    prefix = "model." if f"model.{next(iter(wanted))}" in stored else ""
    tied = set(model.all_tied_weights_keys)
    missing = sorted(name for name in wanted if prefix + name not in stored and name not in tied)
    unexpected = sorted(set(stored) - {prefix + name for name in wanted})
    names = {name: prefix + name for name in wanted if prefix + name in stored}
    misshapen = [name for name, key in names.items() if stored[key].size != wanted[name].shape]
    for kind, found in (("lacks", missing), ("also has", unexpected), ("has another shape of", misshapen)):
        if found:
            raise CheckpointError(
                f"{shards}: {kind} {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}, going by "
                f"{CONFIG_NAME}. Is that the configuration of this run? Adapters (LoRA) are not joined."
            )
    return names


def _load(shards: Path, metadata: Metadata, names: dict[str, str], progress: bool) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in _each_tensor(shards, metadata, names, progress):
        # They start as NaN: what no shard covers would be whatever was in memory.
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{shards}: {name} is NaN, or the shards do not cover it.")
        state[name] = tensor
    return state


def _each_tensor(
    shards: Path, metadata: Metadata, names: dict[str, str], progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    reader = _Reader(shards, metadata)
    for name, key in tqdm(names.items(), unit="tensor", desc="shards", disable=not progress):
        stored = metadata.state_dict_metadata[key]
        floating = stored.properties.dtype.is_floating_point
        tensor = torch.full(stored.size, torch.nan if floating else 0, dtype=stored.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist says
                dcp.load({key: tensor}, storage_reader=reader, no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # whatever a damaged shard leads to
            if isinstance(error, dcp.CheckpointException):
                ((error, _),) = error.failures.values()  # by process: there is one
            raise CheckpointError(f"{shards}: {name} cannot be read ({_line(error)}). Is the save complete?") from None
        yield name, tensor


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
