"""Reads and compares what is on disk."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors_of(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_same_tensors(found, wanted):
    """Compares tensors by name, or those of folders."""
    found, wanted = (each if isinstance(each, dict) else tensors_of(each) for each in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
