"""Pairwise exchange: an all-to-all with one partner at a time.

Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005).

Cost: n-1 steps, each rank sends (n-1)/n M bytes, which is the least possible; never more than one message at a time
in each direction, which is what a switch likes.

On 4 ranks, who sends to whom::

    step 1   0->1  1->2  2->3  3->0
    step 2   0->2  1->3  2->0  3->1
    step 3   0->3  1->0  2->1  3->2
"""

from collections.abc import Iterator

from minidist.schedule import Recv, Send, Step, alike


@alike
def pairwise_all_to_all(rank: int, world_size: int) -> Iterator[Step]:
    """Send to rank + 1, 2, 3, ... while receiving from rank - 1, 2, 3, ..."""
    for distance in range(1, world_size):
        dst = (rank + distance) % world_size
        src = (rank - distance) % world_size
        yield Send(dst, dst), Recv(src, world_size + src)
