"""The fused operator `attnres::mix` and its back ends. They import nothing from the package; `depth_kernels` picks one.

Nothing is imported here: `triton_backend` needs Triton and `cpu_backend` numba, which not every platform has.
"""

ABI = 3  # of the operator; `depth_kernels.KERNEL_ABI` must be the same
