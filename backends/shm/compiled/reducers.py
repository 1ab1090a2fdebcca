"""What a reduction does to the elements, compiled once for each dtype and operation.

A *reducer* combines its sources, in their order, and writes the result to all of its targets. In an all-reduce in
place the targets are the sources. float16 and bfloat16 are added as float32 and rounded once, at the end.

Two sources, which is what two ranks have, take one pass: LLVM makes it load several vectors, add, and store to all
targets before it goes on. More are added up tile by tile in a scratch that stays in the nearest cache. The target may
be any of one or two sources, and else only the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from numba.extending import overload

from backends.shm.compiled.copies import copy
from backends.shm.compiled.machine import at, bits_of, float_of, float_of_half, half_of_float, inner, load
from minidist.communicator import ReduceOp

SUM, MIN, MAX, PRODUCT, BAND, BOR, BXOR = range(7)
OPS = (
    ReduceOp.SUM,
    ReduceOp.MIN,
    ReduceOp.MAX,
    ReduceOp.PRODUCT,
    ReduceOp.BAND,
    ReduceOp.BOR,
    ReduceOp.BXOR,
)
TILE_BYTES = 4096
SCRATCH_BYTES = 2 * TILE_BYTES
"""A tile of 16-bit numbers as float32."""
REDUCER = types.void(*[types.int64] * 6)

BFLOAT16 = np.int16
FLOAT16 = np.uint16
"""How a reducer is told the two: numba has no dtype for the first, and no arithmetic for the second."""


KINDS = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.uint8,
    torch.complex64: np.float32,
    torch.complex128: np.float64,
}
"""What the dtypes are to a reducer; complex numbers, which are only added, are two."""


def itemsize_of(dtype: torch.dtype) -> int:
    """Return the bytes of what a reducer takes for an element."""
    return np.dtype(KINDS[dtype]).itemsize


def wide(x):
    """Return an element as what it is added as."""
    raise NotImplementedError


def narrow(x, like):
    """Return what was added as an element of the dtype of ``like``."""
    raise NotImplementedError


def bitwise(op, a, b):
    """Return two integers combined bit by bit."""
    raise NotImplementedError


@overload(wide)
def _wide(x):
    if x is types.int16:
        return lambda x: float_of(np.uint32(np.uint16(x)) << np.uint32(16))
    if x is types.uint16:
        return lambda x: float_of_half(x)
    return lambda x: x


@overload(narrow)
def _narrow(x, like):
    if like is types.int16:
        return lambda x, like: bfloat16_of(x)
    if like is types.uint16:
        return lambda x, like: half_of_float(x)
    return lambda x, like: x


@overload(bitwise)
def _bitwise(op, a, b):
    if isinstance(a, types.Integer):
        return lambda op, a, b: a & b if op == BAND else a | b if op == BOR else a ^ b
    return lambda op, a, b: a  # for numba alone, which compiles all that `combined` names; checks.py refuses floats


@inner
def rounded(x):
    """Return the bits of a float32 of which the upper half is the bfloat16 next to it; ties go to the even one.

    No NaN needs a case of its own: those that come of bfloat16 have zeros in their lower half, where nothing carries.
    """
    bits = bits_of(x)
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))


@inner
def bfloat16_of(x):
    """Return the bits of the bfloat16 next to a float32."""
    return np.int16(rounded(x) >> np.uint32(16))


@inner
def combined(op, a, b):
    """Return a and b combined; a NaN in either is the result of MIN and MAX, as in torch."""
    if op == SUM:
        return a + b
    if op == PRODUCT:
        return a * b
    if op == MIN:
        return a if a <= b or a != a else b
    if op == MAX:
        return a if a >= b or a != a else b
    return bitwise(op, a, b)


@inner
def combined_pairs(op, a, b):
    """Return two pairs of bfloat16, each in 32 bits, combined; this spares half of the shifts."""
    low = rounded(combined(op, float_of(np.uint32(a << np.uint32(16))), float_of(np.uint32(b << np.uint32(16)))))
    high = rounded(combined(op, float_of(a & np.uint32(0xFFFF0000)), float_of(b & np.uint32(0xFFFF0000))))
    return np.uint32((high & np.uint32(0xFFFF0000)) | (low >> np.uint32(16)))


@inner
def reduce_pairs(mine, theirs, num_pairs, op):
    """Combine pairs of bfloat16 in place on both sides; return how many elements that are."""
    a = carray(at(mine), num_pairs, np.uint32)
    b = carray(at(theirs), num_pairs, np.uint32)
    for i in range(num_pairs):
        x = combined_pairs(op, a[i], b[i])
        a[i] = x
        b[i] = x
    return 2 * num_pairs


def make_reducer(dtype: Any, op: int) -> Any:
    """Return the reducer of a dtype, as numpy calls it, and an operation; compiles it, or loads it from the cache."""
    itemsize = np.dtype(dtype).itemsize
    is_short = itemsize == 2
    is_bfloat16 = dtype is BFLOAT16
    length = TILE_BYTES // itemsize

    def reduce(sources, num_sources, targets, num_targets, count, scratch):
        own = load(targets)
        is_own = own == load(sources)
        if is_own and num_sources == 2 and num_targets == 2 and load(targets + 8) == load(sources + 8):
            num_done = 0
            if is_bfloat16:
                num_done = reduce_pairs(own, load(sources + 8), count // 2, op)
            a = carray(at(own), count, dtype)
            b = carray(at(load(sources + 8)), count, dtype)
            for i in range(num_done, count):
                x = narrow(combined(op, wide(a[i]), wide(b[i])), a[i])
                a[i] = x
                b[i] = x
            return
        for start in range(0, count, length):
            size = min(length, count - start)
            first = start * itemsize
            tile = carray(at(own + first), size, dtype)
            if is_short and num_sources > 2:
                total = carray(at(scratch), size, np.float32)
                add_wide(total, sources, num_sources, first, dtype, op)
                for i in range(size):
                    tile[i] = narrow(total[i], tile[i])
            elif num_sources == 2 and own == load(sources + 8):
                other = carray(at(load(sources) + first), size, dtype)
                for i in range(size):
                    tile[i] = narrow(combined(op, wide(other[i]), wide(tile[i])), tile[i])
            else:
                if not is_own:
                    copy(own + first, load(sources) + first, size * itemsize)
                for k in range(1, num_sources):
                    other = carray(at(load(sources + 8 * k) + first), size, dtype)
                    for i in range(size):
                        tile[i] = narrow(combined(op, wide(tile[i]), wide(other[i])), tile[i])
            for k in range(1, num_targets):
                copy(load(targets + 8 * k) + first, own + first, size * itemsize)

    return cfunc(REDUCER, cache=True)(reduce)


@inner
def add_wide(total, sources, num_sources, first, dtype, op):
    """Add up a tile of 16-bit numbers as float32."""
    part = carray(at(load(sources) + first), total.size, dtype)
    for i in range(total.size):
        total[i] = wide(part[i])
    for k in range(1, num_sources):
        part = carray(at(load(sources + 8 * k) + first), total.size, dtype)
        for i in range(total.size):
            total[i] = combined(op, total[i], wide(part[i]))
