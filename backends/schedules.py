"""The schedule that a collective runs when a backend brings nothing better.

The sources are Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations
in MPICH" (2005), and for the barrier Hensgen, Finkel and Manber, "Two algorithms for barrier
synchronization" (1988). With n ranks and a tensor of M bytes, one rank sends at most

| collective | algorithm | steps | bytes |
|---|---|---|---|
| all_reduce | direct: reduce-scatter, then all-gather | 2 | 2 (n-1)/n M |
| reduce_scatter, all_gather, all_to_all | direct: every rank to every rank | 1 | (n-1)/n M |
| broadcast, reduce | binomial tree | ceil(log2 n) | ceil(log2 n) M, or M |
| gather, scatter | direct: every rank with the root | 1 | (n-1)/n M at the root of a scatter |
| barrier | dissemination | ceil(log2 n) | ceil(log2 n) |

where M of an all-gather or reduce-scatter is its larger tensor. Direct is the right default for a
transport of which nothing is known: fewest steps, least bytes; it needs room for n-1 messages at once.
Each element is reduced on one rank, in one order, so the results are identical on all ranks::

    rank 0   rank 1   rank 2        direct all-reduce of chunks a b c on 3 ranks
    a0b0c0   a1b1c1   a2b2c2        step 1: chunk r to rank r, which adds
    a        b        c             step 2: the sum from rank r to everybody
    a b c    a b c    a b c
"""

from collections.abc import Iterator

from minidist.schedule import Recv, Reduce, Send, Step


def _others(rank: int, world_size: int) -> list[int]:
    """The other ranks, the next one first, so that not all begin with the same one."""
    return [(rank + distance) % world_size for distance in range(1, world_size)]


def direct_reduce_scatter(rank: int, world_size: int) -> Iterator[Step]:
    """Send chunk r to rank r and reduce what arrives."""
    peers = _others(rank, world_size)
    yield *(Send(peer, peer) for peer in peers), *(Reduce(peer, rank) for peer in reversed(peers))


def direct_all_gather(rank: int, world_size: int) -> Iterator[Step]:
    """Send the own chunk to every rank."""
    peers = _others(rank, world_size)
    yield *(Send(peer, rank) for peer in peers), *(Recv(peer, peer) for peer in reversed(peers))


def direct_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Reduce-scatter, then all-gather."""
    yield from direct_reduce_scatter(rank, world_size)
    yield from direct_all_gather(rank, world_size)


def direct_gather(rank: int, world_size: int, root: int) -> Iterator[Step]:
    """Send every chunk straight to the root."""
    if rank == root:
        yield tuple(Recv(peer, peer) for peer in _others(rank, world_size))
    else:
        yield (Send(root, rank),)


def direct_scatter(rank: int, world_size: int, root: int) -> Iterator[Step]:
    """Send every chunk straight from the root."""
    if rank == root:
        yield tuple(Send(peer, peer) for peer in _others(rank, world_size))
    else:
        yield (Recv(root, rank),)


def direct_all_to_all(rank: int, world_size: int) -> Iterator[Step]:
    """Send input chunk r to rank r; the chunks of the output come after those of the input."""
    peers = _others(rank, world_size)
    yield *(Send(peer, peer) for peer in peers), *(Recv(peer, world_size + peer) for peer in reversed(peers))


def binomial_broadcast(rank: int, world_size: int, root: int) -> Iterator[Step]:
    """Double the ranks that hold the tensor in every step.

    Ranks are counted from the root; in the step of distance d, rank r < d sends to rank r + d.
    """
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


def dissemination_barrier(rank: int, world_size: int) -> Iterator[Step]:
    """Signal rank + 1, 2, 4, ...: after the last step everybody has heard of everybody."""
    distance = 1
    while distance < world_size:
        yield Send((rank + distance) % world_size, 0), Recv((rank - distance) % world_size, 1)
        distance *= 2
