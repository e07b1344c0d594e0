"""Tensors of the result and how each is made from tensors on disk: copied, cut, padded or computed, one at a time."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .checkpoint import Checkpoint, byte_size, inside
from .files import copy_range

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


@dataclass(frozen=True)
class Piece:
    """One tensor of the result.

    Attributes:
        name, shape, dtype: as they are in the result, the dtype as in safetensors headers.
        stored: names on disk of the tensors that it is made from; it is written to the file of the first one.
        make: function that computes it from those tensors. None: the data of the first one is copied, and cut or padded
            with zeros at the end if the shape has another number of elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[str, ...]
    make: Callable[..., torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        return byte_size(self.dtype, self.shape)

    def tensor(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Reads or computes the tensor."""
        parts = [checkpoint.read(name) for name in self.stored]
        if self.make is not None:
            return self.make(*parts).to(TORCH_DTYPES[self.dtype])
        flat, count = parts[0].flatten(), prod(self.shape)
        return torch.cat([flat, flat.new_zeros(max(0, count - len(flat)))])[:count].view(self.shape)


def write_pieces(checkpoint: Checkpoint, pieces: list[Piece], target: Path, progress: Callable[[int], None]):
    """Writes a weight file from the file of the source that has the first stored tensor of every piece.

    Copied data is not loaded; memory holds one computed tensor at a time.
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
        for piece in pieces:
            if piece.make is None:
                begin, end = header[piece.stored[0]]["data_offsets"]
                count = min(end - begin, piece.bytes)
                writer.flush()  # what follows writes to the descriptor directly
                copy_range(reader.fileno(), writer.fileno(), 8 + length + begin, count, progress)
                writer.write(bytes(piece.bytes - count))
            else:
                data = piece.tensor(checkpoint).contiguous().view(torch.uint8).numpy()
                writer.write(data.tobytes())
                progress(piece.bytes)
