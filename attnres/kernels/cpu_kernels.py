"""The CPU kernels of the mixing over depth, compiled by numba and called by `cpu_backend`.

They compute token by token, so that all sources of a token are in the cache after the first pass, in float32:

    r_i = 1 / sqrt(mean(v_i^2) + eps),   w = softmax_i(q . v_i r_i),   h = scale sum_i w_i v_i,
    y = (gain + offset) h / sqrt(mean(h^2) + norm_eps),  or y = h without a norm

A kernel has one argument, because every argument takes time: the address of a table of 64-bit numbers. The constants
below name its entries. They are followed by the addresses of the n sources and, for the backward pass, of their
gradients (0: not needed). The caller has to check everything.

A state is one token's row of D numbers, in the dtype of the sources: float32, or bfloat16 as uint16.

Shapes: R tokens of all sequences, D hidden size, n sources, P parts of the tokens.
"""

import ctypes
import math
import sys
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic, overload

DTYPES = {torch.float32: types.float32, torch.bfloat16: types.uint16}

NUMBERS_PER_THREAD = 1 << 17  # waking a thread takes longer than computing with fewer numbers
PARTS_PER_THREAD = 4  # faster threads take more parts

NEXT_PART, PARTS = 0, 1  # each thread takes the next part of the tokens when it is free
COUNT, SIZE, TOKENS = 2, 3, 4  # n, D, R
QUERY, GAIN = 5, 6  # addresses: q [D] float32; the norm's weight [D], or 0
RESULT, WEIGHTS = 7, 8  # y [R, D]; w [R, n] float32, or 0
RESULT_GRADIENT, WEIGHTS_GRADIENT = 7, 9  # of the backward pass: [R, D]; [R, n] float32, or 0
QUERY_PARTS, GAIN_PARTS = 10, 11  # [P, D] float32: sums over the tokens of a part; or 0
EPS, OFFSET, NORM_EPS, SCALE = 12, 13, 14, 15  # float64
SOURCES = 16
LAYOUT = "12q4d"

# Sums over D may be reordered, which makes them fast; infinities and NaN are preserved. The sum over the sources keeps
# the order of a plain model's residual stream, so that a converted model rounds as the plain model does.
FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}}
EXACT = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}


@intrinsic
def _cast(typing_context, pointer, number):
    """Casts a pointer to another type of number."""
    target = types.CPointer(number.instance_type)

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(target))

    return target(pointer, number), generate


@intrinsic
def _pointer(typing_context, address, place, like):
    """Returns the pointer to the number at a place after an address; `like` is a pointer to numbers of its type."""

    def generate(context, builder, signature, arguments):
        start = builder.inttoptr(arguments[0], context.get_value_type(like))
        return builder.gep(start, [arguments[1]], source_etype=context.get_data_type(like.dtype))

    return like(types.int64, types.int64, like), generate


@intrinsic
def _take(typing_context, pointer):
    """Returns the integer at a pointer and increments it atomically, so that no two threads get the same one."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(pointer), generate


def _read(number):
    """Converts a number of a state to float32."""


@overload(_read)
def _(number):
    if number == types.uint16:  # bfloat16 is the upper half of float32
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


def _write(state, place, number):
    """Stores a float32 number in a state, rounded to nearest, ties to even."""


@overload(_write)
def _(state, place, number):
    if state.dtype != types.uint16:

        def write(state, place, number):
            state[place] = number
    else:

        def write(state, place, number):
            bits = np.float32(number).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            state[place] = np.uint16(rounded) if number == number else np.uint16(0x7FC0)

    return write


def _softmax(weights):
    """Replaces logits by their softmax, in place."""


@overload(_softmax)
def _(weights):
    def softmax(weights):
        highest = weights[0]
        for i in range(1, len(weights)):
            highest = weights[i] if weights[i] > highest else highest
        total = np.float32(0)
        for i in range(len(weights)):
            weights[i] = np.float32(math.exp(weights[i] - highest))
            total += weights[i]
        for i in range(len(weights)):
            weights[i] /= total

    return softmax


def _squares_and_product(state, query):
    """Returns v . v and v . q."""


@overload(_squares_and_product, jit_options=FAST)
def _(state, query):
    def sums(state, query):
        square, product = np.float32(0), np.float32(0)
        for j in range(len(query)):
            number = _read(state[j])
            square += number * number
            product += number * query[j]
        return square, product

    return sums


def _dot(numbers, state):
    """Returns the dot product of float32 numbers and a state."""


@overload(_dot, jit_options=FAST)
def _(numbers, state):
    def dot(numbers, state):
        total = np.float32(0)
        for j in range(len(numbers)):
            total += numbers[j] * _read(state[j])
        return total

    return dot


def _open(states):
    """Returns the table at a pointer as int64 and as float64, and any pointer to float32, which `_pointer` needs."""


@overload(_open)
def _(states):
    def opened(states):
        table = _cast(states, np.int64)
        size = SOURCES + 2 * carray(table, (SOURCES,))[COUNT]
        return carray(table, (size,)), carray(_cast(states, np.float64), (SOURCES,)), _cast(states, np.float32)

    return opened


def _mix(states):
    """Computes y and w; `states` points to the table, and its type is that of a pointer to the sources' numbers."""
    table, numbers, floats = _open(states)
    count, size, tokens, parts, gain = table[COUNT], table[SIZE], table[TOKENS], table[PARTS], table[GAIN]
    query, gains = carray(_pointer(table[QUERY], 0, floats), (size,)), carray(_pointer(gain, 0, states), (size,))
    eps, offset, norm_eps = np.float32(numbers[EPS]), np.float32(numbers[OFFSET]), np.float32(numbers[NORM_EPS])
    scale, keep_weights = np.float32(numbers[SCALE]), table[WEIGHTS] != 0
    mixture, weights = np.empty(size, np.float32), np.empty(count, np.float32)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            if keep_weights:
                weights = carray(_pointer(table[WEIGHTS], token * count, floats), (count,))
            for i in range(count):
                state = carray(_pointer(table[SOURCES + i], token * size, states), (size,))
                square, product = _squares_and_product(state, query)
                weights[i] = product / np.float32(math.sqrt(square / np.float32(size) + eps))
            _softmax(weights)

            # Four sources at a time: with one, reading and writing the sum would take most of the time.
            first = (count - 1) % 4 + 1
            weight, state = scale * weights[0], carray(_pointer(table[SOURCES], token * size, states), (size,))
            for j in range(size):
                mixture[j] = weight * _read(state[j])
            for i in range(1, first):
                weight = scale * weights[i]
                state = carray(_pointer(table[SOURCES + i], token * size, states), (size,))
                for j in range(size):
                    mixture[j] += weight * _read(state[j])
            for i in range(first, count, 4):
                a, b, c, d = scale * weights[i], scale * weights[i + 1], scale * weights[i + 2], scale * weights[i + 3]
                va = carray(_pointer(table[SOURCES + i], token * size, states), (size,))
                vb = carray(_pointer(table[SOURCES + i + 1], token * size, states), (size,))
                vc = carray(_pointer(table[SOURCES + i + 2], token * size, states), (size,))
                vd = carray(_pointer(table[SOURCES + i + 3], token * size, states), (size,))
                for j in range(size):
                    number = (mixture[j] + a * _read(va[j])) + b * _read(vb[j])
                    mixture[j] = (number + c * _read(vc[j])) + d * _read(vd[j])

            row = carray(_pointer(table[RESULT], token * size, states), (size,))
            if gain:
                square = _dot(mixture, mixture)
                inverse = np.float32(1) / np.float32(math.sqrt(square / np.float32(size) + norm_eps))
                for j in range(size):
                    _write(row, j, mixture[j] * inverse * (_read(gains[j]) + offset))
            else:
                for j in range(size):
                    _write(row, j, mixture[j])


def _mix_backward(states):
    """Computes the gradients of the sources, the query and the norm's weight.

    With c_i = dh . v_i + dw_i and the gradient of logit i, s_i = w_i (c_i - sum_j w_j c_j):

        dv_i = w_i dh + s_i r_i (q - (q . v_i) r_i^2 v_i / D),    dq = sum_i s_i r_i v_i
    """
    table, numbers, floats = _open(states)
    count, size, tokens, parts, gain = table[COUNT], table[SIZE], table[TOKENS], table[PARTS], table[GAIN]
    query, gains = carray(_pointer(table[QUERY], 0, floats), (size,)), carray(_pointer(gain, 0, states), (size,))
    given_weights = table[WEIGHTS_GRADIENT]
    eps, offset, norm_eps = np.float32(numbers[EPS]), np.float32(numbers[OFFSET]), np.float32(numbers[NORM_EPS])
    scale, width = np.float32(numbers[SCALE]), np.float32(size)
    mixture, gradient = np.empty(size, np.float32), np.empty(size, np.float32)
    products, inverses = np.empty(count, np.float32), np.empty(count, np.float32)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        query_sum = carray(_pointer(table[QUERY_PARTS], part * size, floats), (size,))
        gain_sum = carray(_pointer(table[GAIN_PARTS], part * size, floats), (size,))
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            weights = carray(_pointer(table[WEIGHTS], token * count, floats), (count,))
            for j in range(size):
                mixture[j] = np.float32(0)
            for i in range(count):
                state = carray(_pointer(table[SOURCES + i], token * size, states), (size,))
                square, products[i] = _squares_and_product(state, query)
                weight = scale * weights[i]
                for j in range(size):
                    mixture[j] += weight * _read(state[j])
                inverses[i] = np.float32(1) / np.float32(math.sqrt(square / width + eps))

            row = carray(_pointer(table[RESULT_GRADIENT], token * size, states), (size,))
            if gain:
                for j in range(size):
                    gradient[j] = _read(row[j]) * (_read(gains[j]) + offset)
                square, along = _dot(mixture, mixture), _dot(mixture, gradient)
                inverse = np.float32(1) / np.float32(math.sqrt(square / width + norm_eps))
                shrink = along * inverse * inverse / width
                for j in range(size):
                    number = _read(row[j])
                    gain_sum[j] += number * mixture[j] * inverse
                    gradient[j] = inverse * (gradient[j] - shrink * mixture[j])
            else:
                for j in range(size):
                    gradient[j] = _read(row[j])
            mean = _dot(gradient, mixture)
            for j in range(size):
                gradient[j] *= scale
            changes = carray(_pointer(given_weights, token * count, floats), (count,))
            if given_weights:
                for i in range(count):
                    mean += weights[i] * changes[i]

            for i in range(count):
                state = carray(_pointer(table[SOURCES + i], token * size, states), (size,))
                change = _dot(gradient, state)
                if given_weights:
                    change += changes[i]
                weight = weights[i]
                slope = weight * (change - mean) * inverses[i]
                pull = slope * products[i] * inverses[i] * inverses[i] / width
                address = table[SOURCES + count + i]
                if address:
                    by_state = carray(_pointer(address, token * size, states), (size,))
                    for j in range(size):
                        number = _read(state[j])
                        query_sum[j] += slope * number
                        _write(by_state, j, weight * gradient[j] + slope * query[j] - pull * number)
                else:
                    for j in range(size):
                        query_sum[j] += slope * _read(state[j])


@lru_cache
def kernels(dtype: torch.dtype) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Returns the forward and the backward kernel for a dtype of `DTYPES`, functions of the address of a table.

    Compiling takes seconds. numba caches the result on disk.
    """
    return _compile(_mix, DTYPES[dtype]), _compile(_mix_backward, DTYPES[dtype])


def _compile(function: Callable, states: types.Type) -> Callable[[int], None]:
    signature = types.void(types.CPointer(states))
    try:
        compiled = cfunc(signature, cache=True, **EXACT)(function)
    except RuntimeError:  # there is no writable folder for the cache
        compiled = cfunc(signature, **EXACT)(function)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    kernel.compiled = compiled  # owns the code
    return kernel


def parts(numbers: int, tokens: int) -> int:
    """Returns into how many parts to divide the tokens of a call that reads this many numbers; 1 if they are few."""
    if numbers < 2 * NUMBERS_PER_THREAD or tokens < 2:
        return 1
    return min(tokens, PARTS_PER_THREAD * min(torch.get_num_threads(), numbers // NUMBERS_PER_THREAD))


def run(kernel: Callable[[int], None], address: int, parts: int):
    """Calls a kernel on one thread or, if there are several parts and OpenMP, on as many threads as torch uses."""
    threads = min(parts, torch.get_num_threads()) if parts > 1 else 1
    if threads == 1 or _OPENMP is None:
        kernel(address)
    else:
        _OPENMP(kernel.compiled.address, address, threads, 0)


def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Returns the function that runs another one on OpenMP's threads, which torch's builds for Linux load, or `None`.

    torch uses the same threads. Other threads would compete with them for the cores, because OpenMP's threads wait for
    work without sleeping.
    """
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
    return function


_OPENMP = _openmp()
