"""Swing: recursive halving and doubling whose partners stay close on a ring or a torus.

Source: De Sensi, Bonato, Saam and Hoefler, "Swing: short-cutting rings for higher bandwidth allreduce" (2024).

Nomenclature: p is the largest power of two up to n; other ranks fold as in `backends.schedules.doubling`. In step s
an even rank exchanges with rank + d and an odd one with rank - d, where d = (1 - (-2)^(s+1)) / 3 = 1, -1, 3, -5, 11,
... So the partners swing from side to side, at a third of the distances of a power of two.

Cost: that of halving and doubling, 2 log2 p steps and 2 (p-1)/p M bytes; the messages cross fewer links.

The partners of rank 0 and of rank 1 of 8::

    step 1    0 -> 1        1 -> 0
    step 2    0 -> 7        1 -> 2
    step 3    0 -> 3        1 -> 6
"""

from collections.abc import Iterator
from functools import lru_cache

from backends.schedules.doubling import folded, power_of_two
from minidist.schedule import Recv, Reduce, Send, Step, num_chunks


@num_chunks(power_of_two)
def swing_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """In each step send the chunks that the partner will be responsible for, directly or through others."""

    def swing(rank: int, power: int) -> Iterator[Step]:
        steps = range(power.bit_length() - 1)
        for step in steps:
            peer = _partner(rank, step, power)
            yield Send(peer, _reach(peer, step + 1, power)), Reduce(peer, _reach(rank, step + 1, power))
        for step in reversed(steps):
            peer = _partner(rank, step, power)
            yield Send(peer, _reach(rank, step + 1, power)), Recv(peer, _reach(peer, step + 1, power))

    yield from folded(swing, rank, world_size, range(power_of_two(world_size)))


def _partner(rank: int, step: int, power: int) -> int:
    distance: int = (1 - (-2) ** (step + 1)) // 3
    return (rank + distance if rank % 2 == 0 else rank - distance) % power


@lru_cache(maxsize=2**16)
def _reach(rank: int, step: int, power: int) -> tuple[int, ...]:
    """Return the ranks that ``rank`` can reach from this step on, which are the chunks that it keeps until then."""
    if 1 << step >= power:
        return (rank,)
    return tuple(sorted(_reach(rank, step + 1, power) + _reach(_partner(rank, step, power), step + 1, power)))
