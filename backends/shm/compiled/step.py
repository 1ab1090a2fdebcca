"""A step of an optimizer in shares as one pass: reduce, step, and write the new values to all ranks.

Each rank does so for its share of a bucket, tile by tile, so that what is read once stays in the nearest cache::

    gradients of all ranks --add--> tile --step, with this rank's state--> values --stream--> values of the others
"""

from __future__ import annotations

import numpy as np
from numba import carray

from backends.shm.compiled.copies import stream
from backends.shm.compiled.desk import (
    ARRIVALS,
    DONE,
    ITEMSIZE,
    NBYTES,
    RANK,
    SCRATCH,
    SIGNATURE,
    SOURCES,
    TARGETS,
    WORLD_SIZE,
)
from backends.shm.compiled.machine import at, inner, kernel, load, store
from backends.shm.compiled.meeting import entry, meet, offset_of
from backends.shm.compiled.reducers import SCRATCH_BYTES
from backends.shm.compiled.step_words import KIND, NUM_ROWS, ROW_BYTES, ROWS, SGD
from backends.shm.compiled.ways import MEETING, combine, finish, offered, own_first
from backends.shm.layout import NOWHERE

ITEM = 4
"""Bytes of a float32, which is all that is stepped here."""


@inner
def number(row: int, index: int) -> np.float32:
    """Return one of a row's numbers."""
    return np.float32(carray(at(row + 32 + 8 * index), 1, np.float64)[0])


@inner
def step_sgd(row: int, grad: int, value: int, offset: int, count: int) -> None:
    g = carray(at(grad), count, np.float32)
    x = carray(at(value), count, np.float32)
    scale, lr, decay = number(row, 0), number(row, 1), number(row, 2)
    momentum, nesterov = number(row, 3), number(row, 4)
    if load(row + 16) == 0:
        for i in range(count):
            x[i] -= lr * (scale * g[i] + decay * x[i])
        return
    velocity = carray(at(load(row + 16) + offset), count, np.float32)
    own, old = (np.float32(1), momentum) if nesterov else (np.float32(0), np.float32(1))
    for i in range(count):
        total = scale * g[i] + decay * x[i]
        speed = momentum * velocity[i] + total
        velocity[i] = speed
        x[i] -= lr * (own * total + old * speed)


@inner
def step_adam(row: int, grad: int, value: int, offset: int, count: int) -> None:
    g = carray(at(grad), count, np.float32)
    x = carray(at(value), count, np.float32)
    mean = carray(at(load(row + 16) + offset), count, np.float32)
    square = carray(at(load(row + 24) + offset), count, np.float32)
    scale, size, decay, shrink = number(row, 0), number(row, 1), number(row, 2), number(row, 3)
    new_mean, old_square, new_square = number(row, 4), number(row, 5), number(row, 6)
    eps, root = number(row, 7), number(row, 8)
    for i in range(count):
        total = scale * g[i] + decay * x[i]
        m = mean[i] + new_mean * (total - mean[i])
        s = old_square * square[i] + new_square * total * total
        mean[i] = m
        square[i] = s
        x[i] = shrink * x[i] - size * m / (np.sqrt(s) / root + eps)


@inner
def reduce_tile(desk: int, plan: int, start: int, nbytes: int) -> None:
    """Add up the gradients of all ranks, those of this one first."""
    for rank in range(load(desk + WORLD_SIZE)):
        place = own_first(desk, rank)
        store(entry(desk, SOURCES, place), offered(desk, rank) + start)
    store(entry(desk, TARGETS, 0), load(desk + SCRATCH))
    combine(desk, plan, load(desk + WORLD_SIZE), 1, nbytes // load(plan + ITEMSIZE))


@inner
def step_rows(desk: int, plan: int, row: int, values: int, start: int, nbytes: int) -> int:
    """Step what rows have of a tile of the share, from ``row`` on; return the first that goes on in the next tile."""
    end = plan + ROWS + load(plan + NUM_ROWS) * ROW_BYTES
    while row < end and load(row) < start + nbytes:
        first = max(start, load(row))
        last = min(start + nbytes, load(row) + load(row + 8))
        grad = load(desk + SCRATCH) + first - start
        if load(plan + KIND) == SGD:
            step_sgd(row, grad, values + first, first - load(row), (last - first) // ITEM)
        else:
            step_adam(row, grad, values + first, first - load(row), (last - first) // ITEM)
        if load(row) + load(row + 8) > start + nbytes:
            return row
        row += ROW_BYTES
    return row


@inner
def step_share(desk: int, plan: int, source: int) -> None:
    """Reduce and step this rank's share, and write its values to the others."""
    size = load(plan + NBYTES)
    me = load(desk + RANK)
    n = load(desk + WORLD_SIZE)
    row = plan + ROWS
    for start in range(0, size, SCRATCH_BYTES):
        nbytes = min(SCRATCH_BYTES, size - start)
        reduce_tile(desk, plan, me * size + start, nbytes)
        values = (n + me) * size
        row = step_rows(desk, plan, row, source + values, start, nbytes)
        for rank in range(n):
            if rank != me:
                stream(offered(desk, rank) + values + start, source + values + start, nbytes)


@kernel
def step(desk: int, plan: int, source: int, target: int) -> int:
    """Take a step on ``source``, gradients and then values in shared memory; ``target`` is not used."""
    status = meet(desk, 0, load(plan + SIGNATURE), offset_of(desk, source))
    if status != DONE:
        return status
    if load(desk + ARRIVALS) == 1:
        step_share(desk, plan, source)
    return finish(desk, meet(desk, 1, MEETING, NOWHERE))
