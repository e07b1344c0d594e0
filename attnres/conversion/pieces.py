"""Tensors of the result and how each is made from tensors on disk: copied, cut, padded or computed, one at a time."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.nn.functional import pad

from .checkpoint import Checkpoint, byte_size

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


@dataclass(frozen=True)
class Piece:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as in safetensors headers
    stored: tuple[str, ...]  # names on disk of what it is made from; it is written to the file of the first one
    # Computes it from those tensors. None: the data of the first one is copied, and cut or padded with zeros at the end
    # if the shape has another number of elements.
    make: Callable[..., torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        return byte_size(self.dtype, self.shape)

    def tensor(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Reads or computes the tensor."""
        parts = [checkpoint.read(name) for name in self.stored]
        if self.make is not None:
            return self.make(*parts).to(TORCH_DTYPES[self.dtype])
        flat = parts[0].flatten()
        missing = prod(self.shape) - len(flat)
        return (pad(flat, (0, missing)) if missing else flat).view(self.shape)  # a negative number cuts


def write_pieces(checkpoint: Checkpoint, pieces: list[Piece], target: Path, progress: Callable[[int], object]):
    """Writes a weight file; memory holds one tensor at a time, which `safetensors.torch.save_file` cannot do."""
    pieces = sorted(pieces, key=lambda piece: byte_size(piece.dtype, (8,)), reverse=True)  # so that all are aligned
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for piece in pieces:
        offsets = [position, position + piece.bytes]
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
        position += piece.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("xb") as writer:
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        for piece in pieces:
            writer.write(piece.tensor(checkpoint).contiguous().flatten().view(torch.uint8).numpy())
            progress(piece.bytes)
