"""Direct: every rank exchanges with every other rank at once.

Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005), for the
reduce-scatter and all-gather for small numbers of ranks; the names one-shot and two-shot are those of NVIDIA's
all-reduce kernels between GPUs of one host.

Nomenclature: two-shot cuts the tensor into n chunks, and rank r reduces chunk r. One-shot sends the whole tensor to
everybody, and everybody reduces all.

| all-reduce of M bytes | steps | messages of a rank | bytes of a rank |
|---|---|---|---|
| one-shot | 1 | n-1 | (n-1) M |
| two-shot | 2 | 2 (n-1) | 2 (n-1)/n M, which is the least possible |

Two-shot on 3 ranks, chunks a b c; one-shot does the same in one step with all three chunks::

    rank 0   rank 1   rank 2
    a0b0c0   a1b1c1   a2b2c2        step 1: chunk r to rank r, which adds
    a        b        c             step 2: the sum from rank r to everybody
    a b c    a b c    a b c
"""

from collections.abc import Iterator

from minidist.schedule import Recv, Reduce, Send, Step, num_chunks


def _others(rank: int, world_size: int) -> list[int]:
    """The other ranks, the next one first, so that not all begin with the same one."""
    return [(rank + distance) % world_size for distance in range(1, world_size)]


@num_chunks(1)
def one_shot_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Send everything to every rank, and reduce what comes."""
    peers = _others(rank, world_size)
    yield *(Send(peer, 0) for peer in peers), *(Reduce(peer, 0) for peer in reversed(peers))


def two_shot_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Reduce-scatter, then all-gather."""
    yield from direct_reduce_scatter(rank, world_size)
    yield from direct_all_gather(rank, world_size)


def direct_reduce_scatter(rank: int, world_size: int) -> Iterator[Step]:
    """Send chunk r to rank r and reduce what arrives."""
    peers = _others(rank, world_size)
    yield *(Send(peer, peer) for peer in peers), *(Reduce(peer, rank) for peer in reversed(peers))


def direct_all_gather(rank: int, world_size: int) -> Iterator[Step]:
    """Send the own chunk to every rank."""
    peers = _others(rank, world_size)
    yield *(Send(peer, rank) for peer in peers), *(Recv(peer, peer) for peer in reversed(peers))


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
