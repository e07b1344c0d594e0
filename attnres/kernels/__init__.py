"""Fused implementations of the mixing over depth. They know nothing of the package; `depth_mixer` picks them by name.

Nothing is imported here: `attnres.kernels.mix_triton` needs Triton, which not every platform has.
"""
