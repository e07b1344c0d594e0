"""Identifies what a result depends on besides its task: hashes of the checkpoint and versions of packages."""

import hashlib
import json
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj

from .. import hub

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Weights that are not loaded; pickles are, where a checkpoint has nothing else.
OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]
TOKENIZER = re.compile(r"tokeniz|vocab|merges|special_tokens|added_tokens|spiece|chat_template|\.model$|\.jinja$")
PACKAGES = (
    "lm_eval", "torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "evaluate",
    "math-verify", "sympy", "antlr4-python3-runtime", "flash-linear-attention", "triton", "kernels",
    "bitsandbytes",
)  # fmt: skip


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint, downloading it first if `model` is a hub id."""
    folder = hub.local_folder(model, revision, ignore_patterns=OTHER_FORMATS)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model}: has no config.json, so it is not a transformers checkpoint.")
    return folder


def tokenizer_source(name: str) -> Path:
    """Returns the folder of a tokenizer, downloading it first if `name` is a hub id."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    return hub.download(name, allow_patterns=["*token*", "*vocab*", "merges*", "*.model", "*.jinja"])


def tokenizer_identity(folder: Path) -> str:
    """Returns the SHA-256 of a tokenizer's files."""
    return _digest(path for path in folder.iterdir() if path.is_file() and TOKENIZER.search(path.name))


def checkpoint_identity(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of a checkpoint's weights, of its configuration and code, and of its tokenizer."""
    files = [path for path in folder.iterdir() if path.is_file()]
    weights = [path for path in files if path.suffix in WEIGHTS]
    if not weights:
        raise ValueError(f"{folder}: has no weight files ({', '.join(WEIGHTS)}).")
    others = [path for path in files if path.suffix in (".json", ".py") and not TOKENIZER.search(path.name)]
    return {"weights": _digest(weights), "config": _digest(others), "tokenizer": tokenizer_identity(folder)}


def model_identity(model, tokenizer) -> dict[str, str]:
    """Returns the same three hashes for a model and a tokenizer in memory."""
    import torch

    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + data.numpy().tobytes())
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), repr(tokenizer)], default=str)
    return {
        "weights": weights.hexdigest(),
        "config": hashlib.sha256(f"{model.config.to_json_string()}{ends}".encode()).hexdigest(),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


@cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python, this package and those of `packages` that are installed."""
    own = __package__.partition(".")[0]  # not from its metadata: a checkout need not be installed
    found = {"python": platform.python_version(), own: sys.modules[own].__version__}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _digest(paths) -> str:
    """Returns the SHA-256 over names and contents. Files are hashed in parallel: hashing releases the GIL."""
    paths, total = sorted(paths), hashlib.sha256()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, digest in zip(paths, pool.map(_file_digest, paths), strict=True):
            total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names a large file by its SHA-256
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
