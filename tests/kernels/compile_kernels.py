"""Compiles every variant of the kernels for a Hopper and for an MI300 GPU, neither needed; prints the kinds of code."""

import importlib.util
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

path = Path(__file__).parents[2] / "attnres" / "kernels" / "mix_kernels.py"  # without the package, which takes seconds
specification = importlib.util.spec_from_file_location("mix_kernels", path)
kernels = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kernels)

TARGETS = {"cubin": GPUTarget("cuda", 90, 32), "hsaco": GPUTarget("hip", "gfx942", 64)}
TILE = {"D": 97, "WIDTH": 4, "LANES": 16, "VECTOR": 8}
INTEGERS = {"start": "i32", "n": "i32", "eps": "fp32"}


def compile_kernel(kernel, types, **constants):
    """`types`: per argument a type, a tuple of types, or None for an argument that is None."""
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


for query in (None, "*fp32"):
    common = {"sources": ("*bf16",) * 3, "weights": "*fp32", "query": query, **INTEGERS}
    forward = {**common, "logits": "*fp32", "mixture": "*bf16"}
    backward = {
        **common,
        "gradients": (None, "*bf16", "*bf16"),
        "mixture_gradient": "*bf16",
        "weights_gradient": query,
        "logits_gradient": "*fp32",
        "query_slope": query,
    }
    compile_kernel(kernels.mix_forward, forward, FIRST=True, LAST=True, **TILE)
    compile_kernel(kernels.mix_backward, backward, LAST=True, **TILE)
compile_kernel(kernels.mix_forward, {**forward, "carry": "*fp32"}, FIRST=False, LAST=True, **TILE)
compile_kernel(kernels.mix_backward, backward, LAST=False, **TILE)
sums = {"source": "*bf16", "query_slope": "*fp32", "partial_gradients": "*fp32", "num_rows": "i32"}
compile_kernel(kernels.query_backward, sums, D=97, ROWS=64, TILE_ROWS=16, TILE_COLUMNS=128)
