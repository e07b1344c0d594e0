"""The CPU kernels of the mixing over depth, compiled by numba; `cpu_backend` calls them.

Per token, with all sources of it in the cache after the first pass; all arithmetic is float32:

    r_i = 1 / sqrt(mean(v_i^2) + eps),   w = softmax_i(q . v_i r_i),   h = scale sum_i w_i v_i,
    y = (gain + offset) h / sqrt(mean(h^2) + norm_eps),  or y = h without a norm

A kernel takes the address of a table of 64-bit numbers, as every further argument would take time. Its places are named
below; after them follow the addresses of the n sources and, for the backward pass, those of their gradients (0: not
wanted). Nothing is checked here.

Shapes: R tokens of all texts, D hidden size, n sources, P parts of the tokens.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic, overload

DTYPES = {torch.float32: types.float32, torch.bfloat16: types.uint16}

NUMBERS_PER_THREAD = 1 << 17  # a thread for fewer would take longer to wake than they take
PARTS_PER_THREAD = 4  # so that those that get on better can do more

NEXT_PART, PARTS = 0, 1  # parts of the tokens, taken by whichever thread is free
COUNT, SIZE, TOKENS = 2, 3, 4  # n, D, R
QUERY, GAIN = 5, 6  # addresses: q [D] float32; the norm's weight [D], or 0
RESULT, WEIGHTS = 7, 8  # y [R, D]; w [R, n] float32, or 0
RESULT_GRADIENT, WEIGHTS_GRADIENT = 7, 9  # of the backward pass: [R, D]; [R, n] float32, or 0
QUERY_PARTS, GAIN_PARTS = 10, 11  # [P, D] float32: sums over the tokens of a part; or 0
EPS, OFFSET, NORM_EPS, SCALE = 12, 13, 14, 15  # float64
SOURCES = 16
LAYOUT = "12q4d"

# Sums over D may be reordered, which makes them fast; infinite and undefined numbers stay what they are. The sum over
# the sources keeps the order of a plain model's residual stream, so that a conversion rounds as the plain model does.
FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}}
EXACT = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}


@intrinsic
def _cast(typing_context, pointer, number):
    """A pointer to other numbers."""
    target = types.CPointer(number.instance_type)

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(target))

    return target(pointer, number), generate


@intrinsic
def _pointer(typing_context, address, like):
    """An address as a pointer to what `like` points to."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return like(types.int64, like), generate


@intrinsic
def _at(typing_context, pointer, place):
    """A pointer to a later number."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]], source_etype=context.get_data_type(pointer.dtype))

    return pointer(pointer, types.int64), generate


@intrinsic
def _take(typing_context, pointer):
    """The integer at a pointer, which is one more afterwards: no two threads get the same."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(pointer), generate


def _read(number):
    """A number of a state as float32."""


@overload(_read)
def _(number):
    if number == types.uint16:  # bfloat16 is the upper half of float32
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


def _write(state, place, number):
    """float32 as a number of a state, rounded to nearest, ties to even."""


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
    """In place."""


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
    """v . v and v . q."""


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
    """Of float32 numbers and a state."""


@overload(_dot, jit_options=FAST)
def _(numbers, state):
    def dot(numbers, state):
        total = np.float32(0)
        for j in range(len(numbers)):
            total += numbers[j] * _read(state[j])
        return total

    return dot


def _open(states):
    """The table at a pointer, its numbers that are float64, and a pointer to float32 numbers, no matter where."""


@overload(_open)
def _(states):
    def opened(states):
        table = _cast(states, np.int64)
        size = SOURCES + 2 * carray(table, (SOURCES,))[COUNT]
        return carray(table, (size,)), carray(_cast(states, np.float64), (SOURCES,)), _cast(states, np.float32)

    return opened


def _mix(states):
    table, numbers, floats = _open(states)
    count, size, tokens, parts, gain = table[COUNT], table[SIZE], table[TOKENS], table[PARTS], table[GAIN]
    query, gains = carray(_pointer(table[QUERY], floats), (size,)), carray(_pointer(gain, states), (size,))
    written, all_weights = _pointer(table[RESULT], states), _pointer(table[WEIGHTS], floats)
    eps, offset, norm_eps = np.float32(numbers[EPS]), np.float32(numbers[OFFSET]), np.float32(numbers[NORM_EPS])
    scale, keep_weights = np.float32(numbers[SCALE]), table[WEIGHTS] != 0
    mixture, weights = np.empty(size, np.float32), np.empty(count, np.float32)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            if keep_weights:
                weights = carray(_at(all_weights, token * count), (count,))
            for i in range(count):
                state = carray(_at(_pointer(table[SOURCES + i], states), token * size), (size,))
                square, product = _squares_and_product(state, query)
                weights[i] = product / np.float32(math.sqrt(square / np.float32(size) + eps))
            _softmax(weights)

            # Four at a time: one by one, reading and writing the sum would take most of the time.
            first = (count - 1) % 4 + 1
            weight, state = scale * weights[0], carray(_at(_pointer(table[SOURCES], states), token * size), (size,))
            for j in range(size):
                mixture[j] = weight * _read(state[j])
            for i in range(1, first):
                weight = scale * weights[i]
                state = carray(_at(_pointer(table[SOURCES + i], states), token * size), (size,))
                for j in range(size):
                    mixture[j] += weight * _read(state[j])
            for i in range(first, count, 4):
                a, b, c, d = scale * weights[i], scale * weights[i + 1], scale * weights[i + 2], scale * weights[i + 3]
                va = carray(_at(_pointer(table[SOURCES + i], states), token * size), (size,))
                vb = carray(_at(_pointer(table[SOURCES + i + 1], states), token * size), (size,))
                vc = carray(_at(_pointer(table[SOURCES + i + 2], states), token * size), (size,))
                vd = carray(_at(_pointer(table[SOURCES + i + 3], states), token * size), (size,))
                for j in range(size):
                    number = (mixture[j] + a * _read(va[j])) + b * _read(vb[j])
                    mixture[j] = (number + c * _read(vc[j])) + d * _read(vd[j])

            row = carray(_at(written, token * size), (size,))
            if gain:
                square = _dot(mixture, mixture)
                inverse = np.float32(1) / np.float32(math.sqrt(square / np.float32(size) + norm_eps))
                for j in range(size):
                    _write(row, j, mixture[j] * inverse * (_read(gains[j]) + offset))
            else:
                for j in range(size):
                    _write(row, j, mixture[j])


def _mix_backward(states):
    """With c_i = dh . v_i + the gradient of w_i, and the gradient of logit i, s_i = w_i (c_i - sum_j w_j c_j):

    dv_i = w_i dh + s_i r_i (q - (q . v_i) r_i^2 v_i / D),    dq = sum_i s_i r_i v_i.
    """
    table, numbers, floats = _open(states)
    count, size, tokens, parts, gain = table[COUNT], table[SIZE], table[TOKENS], table[PARTS], table[GAIN]
    query, gains = carray(_pointer(table[QUERY], floats), (size,)), carray(_pointer(gain, states), (size,))
    given, all_weights = _pointer(table[RESULT_GRADIENT], states), _pointer(table[WEIGHTS], floats)
    given_weights = table[WEIGHTS_GRADIENT]
    eps, offset, norm_eps = np.float32(numbers[EPS]), np.float32(numbers[OFFSET]), np.float32(numbers[NORM_EPS])
    scale, width = np.float32(numbers[SCALE]), np.float32(size)
    mixture, gradient = np.empty(size, np.float32), np.empty(size, np.float32)
    products, inverses = np.empty(count, np.float32), np.empty(count, np.float32)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        query_sum = carray(_at(_pointer(table[QUERY_PARTS], floats), part * size), (size,))
        gain_sum = carray(_at(_pointer(table[GAIN_PARTS], floats), part * size), (size,))
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            weights = carray(_at(all_weights, token * count), (count,))
            for j in range(size):
                mixture[j] = np.float32(0)
            for i in range(count):
                state = carray(_at(_pointer(table[SOURCES + i], states), token * size), (size,))
                square, products[i] = _squares_and_product(state, query)
                weight = scale * weights[i]
                for j in range(size):
                    mixture[j] += weight * _read(state[j])
                inverses[i] = np.float32(1) / np.float32(math.sqrt(square / width + eps))

            row = carray(_at(given, token * size), (size,))
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
            changes = carray(_at(_pointer(given_weights, floats), token * count), (count,))
            if given_weights:
                for i in range(count):
                    mean += weights[i] * changes[i]

            for i in range(count):
                state = carray(_at(_pointer(table[SOURCES + i], states), token * size), (size,))
                change = _dot(gradient, state)
                if given_weights:
                    change += changes[i]
                weight = weights[i]
                slope = weight * (change - mean) * inverses[i]
                pull = slope * products[i] * inverses[i] * inverses[i] / width
                address = table[SOURCES + count + i]
                if address:
                    by_state = carray(_at(_pointer(address, states), token * size), (size,))
                    for j in range(size):
                        number = _read(state[j])
                        query_sum[j] += slope * number
                        _write(by_state, j, weight * gradient[j] + slope * query[j] - pull * number)
                else:
                    for j in range(size):
                        query_sum[j] += slope * _read(state[j])


@lru_cache
def kernels(dtype: torch.dtype) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Forward and backward for sources of one of `DTYPES`, functions of the address of a table. Compiled once for a
    machine, which takes seconds, then kept by numba."""
    return _compile(_mix, DTYPES[dtype]), _compile(_mix_backward, DTYPES[dtype])


def _compile(function: Callable, states: types.Type) -> Callable[[int], None]:
    signature = types.void(types.CPointer(states))
    try:
        compiled = cfunc(signature, cache=True, **EXACT)(function)
    except RuntimeError:  # no folder can be written to
        compiled = cfunc(signature, **EXACT)(function)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    kernel.compiled = compiled  # which owns the code
    return kernel


def parts(numbers: int, tokens: int) -> int:
    """How many parts the tokens are to be taken in where that many numbers are read: 1 if they are few."""
    if numbers < 2 * NUMBERS_PER_THREAD or tokens < 2:
        return 1
    return min(tokens, PARTS_PER_THREAD * min(torch.get_num_threads(), numbers // NUMBERS_PER_THREAD))


def run(kernel: Callable[[int], None], address: int, parts: int):
    """Calls a kernel on one thread, or if there are several parts on as many as torch uses."""
    threads = min(parts, torch.get_num_threads()) if parts > 1 else 1
    if threads == 1:
        kernel(address)
    elif _OPENMP is not None:
        _OPENMP(kernel.compiled.address, address, threads, 0)
    else:
        others = [_threads().submit(kernel, address) for _ in range(threads - 1)]
        kernel(address)
        for other in others:
            other.result()


def _openmp() -> Callable[[int, int, int, int], None] | None:
    """What calls a function on OpenMP's threads, where torch's builds for Linux have loaded it. Those are torch's own:
    others would have to fight them for the cores, as they wait for their next work without sleeping."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
    return function


_OPENMP = _openmp()


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "attnres")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
