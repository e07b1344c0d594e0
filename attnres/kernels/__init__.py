"""The fused operator `attnres::mix` and its back ends, which `depth_kernels` chooses from.

Nothing is imported here: `triton_backend` needs Triton and `cpu_backend` needs numba, which not every platform has.
"""

ABI = 3  # the version of the operator's arguments and results, equal to `depth_kernels.KERNEL_ABI`
