"""The mixing over depth on CPUs, compiled by numba: one pass for what takes torch five to ten operations.

    w = softmax(logits),    h = sum_i w_i v_i,    y = g * h / sqrt(mean(h^2) + norm_eps)

Without gradients; all sums are float32. Nothing is checked here: `source_table` does.

A kernel takes the address of an array of 64-bit integers, the table, as every further argument would take time. Its
places are named below; shapes there: R tokens of all texts, D hidden size, n sources, Q pseudo-queries, K sublayers.
After the named places follow the addresses of the n sources `[R, D]`, then those of their logits `[R, Q_i]`, then the
numbers of their columns Q_i, each list with room for Q. A source has no logits for the sublayers before it; the last
column belongs to the output, and that of a sublayer is counted from the end.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic, overload

DTYPES = {torch.float32: types.float32, torch.bfloat16: types.uint16}

TILE = 128  # numbers of a state that `mix_together` takes at a time: those of all sources stay in the first cache
NUMBERS_PER_THREAD = 1 << 17  # a thread for fewer would take longer to wake than they take
PARTS_PER_THREAD = 4  # so that those that get on better can do more

# Places of a table. What is written before every call, by `CALL`:
NEXT_PART, PARTS = 0, 1  # parts of the tokens, taken by whichever thread is free
FIRST, COUNT = 2, 3  # sources from FIRST to COUNT, n of them in all; those before FIRST come as a mixture
READER, READERS = 4, 5  # the sublayer, and for how many from it on (`mix_together`), or which mixture it has (`mix`)
STATE = 6  # the address of a source without logits, or 0
GAIN = 7  # the address of a norm's weight [D], or 0
RESULT = 8  # the address for the result
EPS, OFFSET, NORM_EPS = 9, 10, 11  # float64: of the key norms; what is added to the gain; of the norm
CALL = Struct("=9q3d")
# What stays:
QUERIES = 12  # the address of the scaled pseudo-queries [Q, D], float32
MIXTURES, MIXTURE_LOGITS = 13, 14  # the addresses of mixtures [K, R, D] and their logits [K, R], float32
NUM_QUERIES, SIZE, TOKENS = 15, 16, 17  # Q, D, R
LISTS = 18

# What sums may be reordered by; infinite and undefined numbers stay what they are.
FAST = {"reassoc", "contract", "nsz", "arcp"}


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
    """In place; returns the logarithm of the sum of the exponentials."""


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
        return np.float32(math.log(total)) + highest

    return softmax


def _open(states):
    """The table at a pointer, its numbers that are float64, and a pointer to float32 numbers, no matter where."""


@overload(_open)
def _(states):
    def opened(states):
        table = _cast(states, np.int64)
        size = LISTS + 3 * carray(table, (LISTS,))[NUM_QUERIES]
        return carray(table, (size,)), carray(_cast(states, np.float64), (LISTS,)), _cast(states, np.float32)

    return opened


def _score(states):
    """The logits of the source STATE for the sublayers from READER on."""
    table, numbers, floats = _open(states)
    size, tokens, parts, reader = table[SIZE], table[TOKENS], table[PARTS], table[READER]
    count, eps = table[NUM_QUERIES] - reader, numbers[EPS]
    source, queries = _pointer(table[STATE], states), _pointer(table[QUERIES], floats)
    scores = _pointer(table[RESULT], floats)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            state = carray(_at(source, token * size), (size,))
            square = np.float32(0)
            for j in range(size):
                square += _read(state[j]) * _read(state[j])
            scale = np.float32(1 / math.sqrt(square + eps * size))
            row = carray(_at(scores, token * count), (count,))
            for i in range(count):
                query = carray(_at(queries, (reader + i) * size), (size,))
                product = np.float32(0)
                for j in range(size):
                    product += _read(state[j]) * query[j]
                row[i] = product * scale


def _mix(states):
    """The mixture of the sources from FIRST on, the READERS-th mixture of those before and STATE, normed by GAIN."""
    table, numbers, floats = _open(states)
    size, tokens, parts, capacity = table[SIZE], table[TOKENS], table[PARTS], table[NUM_QUERIES]
    first, from_end, early = table[FIRST], capacity - table[READER], table[READERS]
    sources, logits, columns = LISTS + first, LISTS + capacity + first, LISTS + 2 * capacity + first
    late = table[COUNT] - first
    newest, gain, written = table[STATE], table[GAIN], _pointer(table[RESULT], states)
    query = carray(_at(_pointer(table[QUERIES], floats), table[READER] * size), (size,))
    gains = carray(_pointer(gain, states), (size,))
    eps, offset, norm_eps = np.float32(numbers[EPS] * size), np.float32(numbers[OFFSET]), numbers[NORM_EPS]
    weights = np.empty(late + (1 if first else 0) + (1 if newest else 0), np.float32)
    mixture = np.empty(size, np.float32)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            for i in range(late):
                place = (token + 1) * table[columns + i] - from_end
                weights[i] = carray(_at(_pointer(table[logits + i], floats), place), (1,))[0]
            if first:
                place = early * tokens + token
                weights[late] = carray(_at(_pointer(table[MIXTURE_LOGITS], floats), place), (1,))[0]
            last = carray(_at(_pointer(newest, states), token * size), (size,))
            if newest:
                square, product = np.float32(0), np.float32(0)
                for j in range(size):
                    number = _read(last[j])
                    square += number * number
                    product += number * query[j]
                weights[len(weights) - 1] = product / np.float32(math.sqrt(square + eps))
            _softmax(weights)

            if first:
                weight = weights[late]
                row = carray(_at(_pointer(table[MIXTURES], floats), (early * tokens + token) * size), (size,))
                for j in range(size):
                    mixture[j] = weight * row[j]
            else:
                weight, state = weights[0], carray(_at(_pointer(table[sources], states), token * size), (size,))
                for j in range(size):
                    mixture[j] = weight * _read(state[j])
            for i in range(0 if first else 1, late):
                weight, state = weights[i], carray(_at(_pointer(table[sources + i], states), token * size), (size,))
                for j in range(size):
                    mixture[j] += weight * _read(state[j])
            square = np.float32(0)
            if newest:
                weight = weights[len(weights) - 1]
                for j in range(size):
                    number = mixture[j] + weight * _read(last[j])
                    mixture[j] = number
                    square += number * number
            elif gain:
                for j in range(size):
                    square += mixture[j] * mixture[j]

            row = carray(_at(written, token * size), (size,))
            if gain:
                scale = np.float32(1 / math.sqrt(square / size + norm_eps))
                for j in range(size):
                    _write(row, j, mixture[j] * scale * (_read(gains[j]) + offset))
            else:
                for j in range(size):
                    _write(row, j, mixture[j])


def _mix_together(states):
    """Mixtures of all sources for READERS sublayers from READER on, and their logits."""
    table, _, floats = _open(states)
    size, tokens, parts, capacity = table[SIZE], table[TOKENS], table[PARTS], table[NUM_QUERIES]
    count, readers, from_end = table[COUNT], table[READERS], capacity - table[READER]
    sources, logits, columns = LISTS, LISTS + capacity, LISTS + 2 * capacity
    mixtures = _pointer(table[MIXTURES], floats)
    together = carray(_pointer(table[MIXTURE_LOGITS], floats), (readers, tokens))
    weights = np.empty((readers, count), np.float32)
    values = np.empty((count, TILE), np.float32)
    while True:
        part = _take(_cast(states, np.int64))
        if part >= parts:
            break
        for token in range(tokens * part // parts, tokens * (part + 1) // parts):
            for k in range(readers):
                for i in range(count):
                    place = (token + 1) * table[columns + i] - from_end + k
                    weights[k, i] = carray(_at(_pointer(table[logits + i], floats), place), (1,))[0]
                together[k, token] = _softmax(weights[k])
            for begin in range(0, size, TILE):
                length = min(TILE, size - begin)
                for i in range(count):
                    state = carray(_at(_pointer(table[sources + i], states), token * size + begin), (length,))
                    value = values[i]
                    for j in range(length):
                        value[j] = _read(state[j])
                for k in range(readers):
                    row = carray(_at(mixtures, (k * tokens + token) * size + begin), (length,))
                    weight, value = weights[k, 0], values[0]
                    for j in range(length):
                        row[j] = weight * value[j]
                    for i in range(1, count - 3, 4):  # one by one, reading and writing the sum would take most time
                        a, b, c, d = weights[k, i], weights[k, i + 1], weights[k, i + 2], weights[k, i + 3]
                        va, vb, vc, vd = values[i], values[i + 1], values[i + 2], values[i + 3]
                        for j in range(length):
                            row[j] += (a * va[j] + b * vb[j]) + (c * vc[j] + d * vd[j])
                    for i in range(1 + (count - 1) // 4 * 4, count):
                        weight, value = weights[k, i], values[i]
                        for j in range(length):
                            row[j] += weight * value[j]


class Kernels(NamedTuple):
    """Functions of the address of a table."""

    score: Callable[[int], None]
    mix: Callable[[int], None]
    mix_together: Callable[[int], None]


@lru_cache
def kernels(dtype: torch.dtype) -> Kernels:
    """Those for sources of one of `DTYPES`. Compiled once for a machine, which takes seconds, then kept by numba."""
    return Kernels(*(_compile(kernel, DTYPES[dtype]) for kernel in (_score, _mix, _mix_together)))


def _compile(function: Callable, states: types.Type) -> Callable[[int], None]:
    signature = types.void(types.CPointer(states))
    options = {"fastmath": FAST, "error_model": "numpy"}
    try:
        compiled = cfunc(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        compiled = cfunc(signature, **options)(function)
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
