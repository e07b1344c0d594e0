"""What a trained AttnRes model has learned to do over depth."""

from .depth_weights import DepthWeights, depth_weights

__all__ = ["DepthWeights", "depth_weights"]
