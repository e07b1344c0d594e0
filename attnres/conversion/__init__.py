"""Checkpoints in and out: plain PreNorm, AttnRes and Kimi K3-style folders, converted without loading the model."""

from .checkpoint import CheckpointError, read_checkpoint
from .converter import Conversion, convert

__all__ = ["CheckpointError", "Conversion", "convert", "read_checkpoint"]
