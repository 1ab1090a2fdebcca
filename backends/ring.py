"""The ring: every rank talks only to its two neighbours.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).

Nomenclature: the tensor is cut into n = world_size chunks; prev_rank and next_rank are the neighbours.
In the *reduce-scatter* half chunk c starts at rank c + 1 and collects one contribution per step, until
rank c holds it complete. In the *all-gather* half the complete chunks go once more around.

Cost for M bytes: 2 (n-1) steps, each rank sends 2 (n-1)/n M bytes, which is the least possible.

Reduce-scatter on 3 ranks, chunks a b c (a01 is the sum of rank 0's and rank 1's a)::

            rank 0          rank 1          rank 2
    start   a0  b0  c0      a1  b1  c1      a2  b2  c2
    step 1  sends c0        sends a1        sends b2          each to the next rank
            a0  b02 c0      a1  b1  c01     a12 b2  c2
    step 2  sends b02       sends c01       sends a12
            A   b02 c0      a1  B   c01     a12 b2  C         rank r holds chunk r
"""

from collections.abc import Iterator

from backends.algorithm import AlgorithmCommunicator
from minidist.communicator import Communicator
from minidist.schedule import Recv, Reduce, Send, Step, alike


@alike
def ring_reduce_scatter(rank: int, world_size: int) -> Iterator[Step]:
    """Pass partial sums around; chunk ``rank`` ends complete."""
    prev_rank, next_rank = (rank - 1) % world_size, (rank + 1) % world_size
    for step in range(world_size - 1):
        yield (
            Send(next_rank, (rank - step - 1) % world_size),
            Reduce(prev_rank, (rank - step - 2) % world_size),
        )


@alike
def ring_all_gather(rank: int, world_size: int) -> Iterator[Step]:
    """Pass chunk ``rank`` around until everybody has every chunk."""
    prev_rank, next_rank = (rank - 1) % world_size, (rank + 1) % world_size
    for step in range(world_size - 1):
        yield Send(next_rank, (rank - step) % world_size), Recv(prev_rank, (rank - step - 1) % world_size)


@alike
def ring_all_reduce(rank: int, world_size: int) -> Iterator[Step]:
    """Reduce-scatter, then all-gather."""
    yield from ring_reduce_scatter(rank, world_size)
    yield from ring_all_gather(rank, world_size)


class RingCommunicator(AlgorithmCommunicator):
    """All-reduce, reduce-scatter and all-gather as rings over any transport; see `AlgorithmCommunicator`."""

    def __init__(self, transport: Communicator, timeout_s: float | None = None, segment_bytes: int = 2**22) -> None:
        rings = {"all_reduce": ring_all_reduce, "reduce_scatter": ring_reduce_scatter, "all_gather": ring_all_gather}
        super().__init__(transport, rings, timeout_s, segment_bytes)
