"""The fused operator `attnres::mix` and its back ends. They know nothing of the package; `depth_kernels` picks them.

Nothing is imported here: `triton_backend` needs Triton and `cpu_backend` numba, which not every platform has.
"""

ABI = 2  # of the operator; `depth_kernels.KERNEL_ABI` must be the same
