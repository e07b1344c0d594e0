"""Compiles all variants of the kernels for Hopper and MI300 GPUs, without these GPUs, and prints their kinds."""

import importlib.util
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

path = Path(__file__).parents[2] / "attnres" / "kernels" / "triton_kernels.py"  # without the package: takes seconds
specification = importlib.util.spec_from_file_location("triton_kernels", path)
kernels = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kernels)

assert isinstance(kernels.mix_forward, triton.JITFunction)  # by which the back end knows that nothing is interpreted

TARGETS = {"cubin": GPUTarget("cuda", 90, 32), "hsaco": GPUTarget("hip", "gfx942", 64)}
ROW = {"D": 97, "BLOCK": 128}
NUMBERS = dict.fromkeys(("start", "n", "num_rows"), "i32")
NUMBERS |= dict.fromkeys(("eps", "norm_offset", "norm_eps", "scale"), "fp32")


def compile_kernel(kernel, types, **constants):
    """Compiles a kernel; `types` has a type, a tuple of types, or None per argument."""
    constants = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    signature = {}
    for index, argument in enumerate(kernel.arg_names):
        of_argument = types.get(argument)
        if of_argument is None:
            constants.setdefault((index,), None)
        elif isinstance(of_argument, tuple):
            constants |= {(index, place): None for place, entry in enumerate(of_argument) if entry is None}
            of_argument = tuple(entry or "constexpr" for entry in of_argument)
        signature[argument] = of_argument or "constexpr"
    for kind, target in TARGETS.items():
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": True})
        assert compiled.asm[kind]
        print(kind)


common = {"sources": ("*bf16",) * 3, "query": "*fp32", "weights": "*fp32", **NUMBERS}
for norm, float32 in ((None, None), ("*bf16", "*fp32")):  # with a norm, what is optional is there
    forward = {**common, "norm_weight": norm, "output": "*bf16", "carry": float32}
    backward = {
        **common,
        "gradients": (None, "*bf16", "*bf16"),
        "norm_weight": norm,
        "mixture": float32,
        "output_gradient": "*bf16",
        "weights_gradient": float32,
        "query_parts": "*fp32",
        "norm_parts": float32,
    }
    compile_kernel(kernels.mix_forward, forward, FIRST=norm is None, LAST=True, WIDTH=4, **ROW)
    compile_kernel(kernels.mix_backward, backward, WIDTH=4, **ROW)
compile_kernel(kernels.mix_forward, forward, FIRST=True, LAST=False, WIDTH=4, **ROW)
for first in (True, False):
    compile_kernel(kernels.add_sources, {**common, "mixture": "*fp32"}, FIRST=first, **ROW)
