"""Output tensors, each built from tensors on disk: copied, cut, padded, or computed, one at a time."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from .checkpoint import DTYPE_BITS, Checkpoint, inside
from .files import copy_range

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


@dataclass(frozen=True)
class Piece:
    """One tensor of the result.

    Attributes:
        name, shape, dtype: in the result; the dtype as headers name it.
        stored: names on disk of what it is made of; the file of the first one is where it goes.
        make: computes it from those tensors. `None`: the data of the first, cut or padded with zeros at the end.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[str, ...]
    make: Callable[..., torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS.get(self.dtype, 8) // 8

    def tensor(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its value, read from the checkpoint."""
        parts = [read_tensor(checkpoint, name) for name in self.stored]
        if self.make is not None:
            return self.make(*parts).to(TORCH_DTYPES[self.dtype])
        (part,) = parts
        flat, count = part.flatten(), prod(self.shape)
        flat = torch.cat([flat, flat.new_zeros(max(0, count - len(flat)))])[:count]
        return flat.view(self.shape)


def read_tensor(checkpoint: Checkpoint, stored: str) -> torch.Tensor:
    """One tensor by its name on disk."""
    with safe_open(inside(checkpoint.folder, checkpoint.tensors[stored].shard), "pt") as file:
        return file.get_tensor(stored)


def write_pieces(checkpoint: Checkpoint, pieces: list[Piece], target: Path, progress: Callable[[int], None]):
    """A weight file of these tensors, which are in one file of the source but for what is computed of others.

    Memory: that of the largest tensor that is computed; what is copied stays on disk.
    """
    shard = checkpoint.tensors[pieces[0].stored[0]].shard
    with inside(checkpoint.folder, shard).open("rb") as reader, target.open("xb") as writer:
        (length,) = struct.unpack("<Q", reader.read(8))
        header = json.loads(reader.read(length))
        pieces = sorted(pieces, key=lambda piece: header[piece.stored[0]]["data_offsets"])
        new_header, position = {"__metadata__": header.get("__metadata__", {"format": "pt"})}, 0
        for piece in pieces:
            offsets = [position, position + piece.bytes]
            new_header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
            position += piece.bytes
        encoded = json.dumps(new_header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        writer.flush()
        for piece in pieces:
            if piece.make is None:
                begin, end = header[piece.stored[0]]["data_offsets"]
                count = min(end - begin, piece.bytes)
                copy_range(reader.fileno(), writer.fileno(), 8 + length + begin, count, progress)
                writer.write(bytes(piece.bytes - count))
            else:
                data = piece.tensor(checkpoint).contiguous().view(torch.uint8).numpy()
                writer.write(data.tobytes())
                progress(piece.bytes)
            writer.flush()
