"""MXFP4 as compressed-tensors packs it: two 4-bit codes per byte, and one 8-bit scale per 32 columns."""

import torch

PACKED, SCALE = ".weight_packed", ".weight_scale"
FORMAT = "mxfp4-pack-quantized"
GROUP = 32
SCALE_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the eight codes without the sign bit


def unpacked_shape(packed: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape of a weight from that of its packed part."""
    return packed[0], 2 * packed[1]


def dequantise(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the weight `[out, in]` in bfloat16, which represents every value within its range exactly.

    Args:
        packed: `[out, in / 2]` uint8; an even column is in the low half of a byte, the next one in the high half.
        scale: `[out, in / 32]` uint8, exponents of two with a bias of 127.
    """
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    factors = torch.exp2(scale.float() - SCALE_BIAS)
    return (values[codes.long()].view(*scale.shape, GROUP) * factors.unsqueeze(-1)).flatten(1).to(torch.bfloat16)
