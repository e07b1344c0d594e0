"""Converts checkpoint folders between plain PreNorm, AttnRes and other layouts without loading the model."""

from .checkpoint import CheckpointError, read_checkpoint
from .converter import Conversion, convert

__all__ = ["CheckpointError", "Conversion", "convert", "read_checkpoint"]
