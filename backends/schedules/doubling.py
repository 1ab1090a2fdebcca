"""Recursive doubling, and recursive halving and doubling: exchanges between ranks whose numbers differ in one bit.

Sources: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005);
Rabenseifner, "Optimization of collective reduction operations" (2004).

Nomenclature: p is the largest power of two up to n. If n is not p, each of the first n - p odd ranks takes over the
values of the even rank before it and gives it the result at the end (`folded`); the other ranks are numbered 0 .. p-1.

| all-reduce of M bytes | steps | bytes of a rank |
|---|---|---|
| recursive doubling | log2 p | M log2 p |
| halving and doubling | 2 log2 p | 2 (p-1)/p M, which is the least possible |

and 2 steps more and 2 M for ranks that fold. Doubling wins for small tensors, halving for large ones.

Halving on 4 ranks, chunks a b c d; doubling runs it backwards, and recursive doubling sends all chunks each time::

              rank 0    rank 1    rank 2    rank 3
    start     a b c d   a b c d   a b c d   a b c d
    step 1    a b       a b       c d       c d        with rank +- 2: keep a half, send the other
    step 2    a         b         c         d          with rank +- 1
"""

from collections.abc import Iterator

from minidist.schedule import Chunks, Recv, Reduce, Schedule, Send, Step, among, num_chunks


def power_of_two(world_size: int) -> int:
    """Return the largest power of two that is not above ``world_size``."""
    return 1 << (world_size.bit_length() - 1)


def folded(schedule: Schedule, rank: int, world_size: int, everything: Chunks) -> Iterator[Step]:
    """Run an all-reduce for powers of two on any number of ranks; ``everything`` is all of its chunks."""
    power = power_of_two(world_size)
    extra = world_size - power
    ranks = [*range(1, 2 * extra, 2), *range(2 * extra, world_size)]
    pair = rank ^ 1
    if rank not in ranks:
        yield (Send(pair, everything),)
        yield (Recv(pair, everything),)
        return
    if rank < 2 * extra:
        yield (Reduce(pair, everything),)
    yield from among(schedule(ranks.index(rank), power), ranks, range(power))
    if rank < 2 * extra:
        yield (Send(pair, everything),)


@num_chunks(1)
def recursive_doubling_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Exchange everything with rank ^ 1, 2, 4, ...: the values of twice as many ranks are in it each time."""

    def doubling(rank: int, power: int) -> Iterator[Step]:
        for bit in range(power.bit_length() - 1):
            peer = rank ^ 1 << bit
            yield Send(peer, 0), Reduce(peer, 0)

    yield from folded(doubling, rank, world_size, 0)


@num_chunks(power_of_two)
def halving_doubling_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Halve what is exchanged until every rank holds one chunk complete, then double it."""

    def halving_doubling(rank: int, power: int) -> Iterator[Step]:
        halves = [1 << bit for bit in range(power.bit_length() - 1)]
        for half in reversed(halves):
            yield Send(rank ^ half, _half(rank ^ half, half)), Reduce(rank ^ half, _half(rank, half))
        for half in halves:
            yield Send(rank ^ half, _half(rank, half)), Recv(rank ^ half, _half(rank ^ half, half))

    yield from folded(halving_doubling, rank, world_size, range(power_of_two(world_size)))


def _half(rank: int, half: int) -> range:
    """Return the chunks that ``rank`` keeps when what it has is halved to so many."""
    first = rank // half * half
    return range(first, first + half)
