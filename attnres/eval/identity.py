"""Hashes of the checkpoint and versions of packages: what a result depends on besides its task."""

import hashlib
import json
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]  # of weights, which are not loaded
TOKENIZER = re.compile(r"tokeniz|vocab|merges|special_tokens|added_tokens|spiece|chat_template|\.model$|\.jinja$")
PACKAGES = (
    "lm_eval", "torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "evaluate",
    "math-verify", "sympy", "antlr4-python3-runtime", "flash-linear-attention", "triton", "kernels",
    "bitsandbytes",
)  # fmt: skip
BLOB_NAME = re.compile(r"[0-9a-f]{64}")


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """A local folder as it is, a hub id as its snapshot.

    Raises:
        ValueError: neither there nor to be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() and revision is not None:
        raise ValueError(f"{model}: a folder has no revisions, got --revision {revision}; leave it out.")
    if not folder.is_dir():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise ValueError(f"{model}: no such folder.")
        folder = _snapshot(model, revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model}: has no config.json, so it is not a transformers checkpoint.")
    return folder


def read_config(folder: Path) -> dict:
    """What config.json holds.

    Raises:
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({' '.join(str(error).split())[:120]}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(config).__name__}.")
    return config


def is_kimi_k3(folder: Path, trust_remote_code: bool) -> bool:
    """Whether a checkpoint has Kimi K3's layout, which transformers would load without its depth mixing.

    Where the checkpoint brings its own model and the user trusts it, that decides.
    """
    config = read_config(folder)
    if trust_remote_code and "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return False
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return text.get("model_type") == "kimi_linear" and bool(text.get("attn_res_block_size"))


def tokenizer_source(name: str) -> Path:
    """The folder of a tokenizer given by folder or hub id."""
    folder = Path(name).expanduser()
    return (
        folder
        if folder.is_dir()
        else _snapshot(name, None, allow=["*token*", "*vocab*", "merges*", "*.model", "*.jinja"])
    )


def tokenizer_identity(folder: Path) -> str:
    """SHA-256 of a tokenizer's files."""
    return _digest(sorted(path for path in folder.iterdir() if path.is_file() and TOKENIZER.search(path.name)))


def checkpoint_identity(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's weights, of its configuration with its code, and of its tokenizer."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix in WEIGHTS]
    if not weights:
        raise ValueError(f"{folder}: has no weight files ({', '.join(WEIGHTS)}).")
    others = [path for path in files if path.suffix in (".json", ".py") and not TOKENIZER.search(path.name)]
    return {"weights": _digest(weights), "config": _digest(others), "tokenizer": tokenizer_identity(folder)}


def model_identity(model, tokenizer) -> dict[str, str]:
    """The same for a model in memory."""
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


def versions() -> dict[str, str]:
    """Of Python and of every package that a score may depend on."""
    own = __package__.partition(".")[0]  # run from a checkout, it need not be installed
    found = {"python": platform.python_version(), own: sys.modules[own].__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _digest(paths: list[Path]) -> str:
    """Over names and contents, several files at a time: hashing releases the interpreter's lock."""
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, digest in zip(paths, pool.map(_file_digest, paths), strict=True):
            total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    target = path.resolve()
    if target.parent.name == "blobs" and BLOB_NAME.fullmatch(target.name):
        return target.name  # the hub's cache names a large file by its SHA-256
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunked(file)


def _chunked(file) -> str:
    """hashlib.file_digest of Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def _snapshot(model: str, revision: str | None, allow: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=allow, ignore_patterns=OTHER_FORMATS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{model}: no such folder, and it cannot be downloaded from the hub ({reason})") from None
