"""Binomial trees: the number of ranks that have the tensor doubles in every step.

Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005).

Cost for M bytes: ceil(log2 n) steps; every rank receives M bytes once, and the root sends M in each of its steps. An
all-reduce is a reduce to rank 0 and a broadcast from it: twice that. Good for small tensors, and for large ones only
because nothing simpler exists.

Broadcast from rank 0 on 6 ranks; a reduce runs it backwards::

    rank     0  1  2  3  4  5
    step 1   0--1                      distance 1
    step 2   0-----2                   distance 2
                1-----3
    step 3   0-----------4             distance 4
                1-----------5
"""

from collections.abc import Iterator

from minidist.schedule import Recv, Reduce, Send, Step, num_chunks


def binomial_broadcast(rank: int, world_size: int, root: int) -> Iterator[Step]:
    """Ranks are counted from the root; in the step of distance d, rank r < d sends to rank r + d."""
    relative = (rank - root) % world_size
    distance = 1
    while distance < world_size:
        if relative < distance and relative + distance < world_size:
            yield (Send((rank + distance) % world_size, 0),)
        elif distance <= relative < 2 * distance:
            yield (Recv((rank - distance) % world_size, 0),)
        distance *= 2


def binomial_reduce(rank: int, world_size: int, root: int) -> Iterator[Step]:
    """Run the tree of the broadcast backwards, from the leaves to the root."""
    for (transfer,) in reversed(list(binomial_broadcast(rank, world_size, root))):
        sends = isinstance(transfer, Send)
        yield (Reduce(transfer.peer, 0) if sends else Send(transfer.peer, 0),)


@num_chunks(1)
def binomial_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Reduce to rank 0, then broadcast."""
    yield from binomial_reduce(rank, world_size, 0)
    yield from binomial_broadcast(rank, world_size, 0)
