"""Analysis of what an AttnRes model has learned over depth: depth weights and training dynamics."""

from .depth_weights import DepthWeights, depth_weights

__all__ = ["DepthWeights", "depth_weights"]
