"""The dissemination barrier: in every step a rank has heard of twice as many.

Source: Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization" (1988).

Cost: ceil(log2 n) steps and messages of one byte per rank, which is the least possible.

What rank 0 of 5 has heard of::

    step 1   from rank 4 (distance 1)     4 0
    step 2   from rank 3 (distance 2)     2 3 4 0
    step 3   from rank 1 (distance 4)     2 3 4 0 1
"""

from collections.abc import Iterator

from minidist.schedule import Recv, Send, Step, alike


@alike
def dissemination_barrier(rank: int, world_size: int) -> Iterator[Step]:
    """Signal rank + 1, 2, 4, ...: after the last step everybody has heard of everybody."""
    distance = 1
    while distance < world_size:
        yield Send((rank + distance) % world_size, 0), Recv((rank - distance) % world_size, 1)
        distance *= 2
