"""Bruck's all-gather and all-to-all: as few steps as a tree, for any number of ranks.

Source: Bruck, Ho, Kipnis, Upfal and Weathersby, "Efficient algorithms for all-to-all communications in multiport
message-passing systems" (1997).

| | steps | bytes of a rank |
|---|---|---|
| all_gather of M bytes | ceil(log2 n) | (n-1)/n M, which is the least possible |
| all_to_all of M bytes | ceil(log2 n) | about M/2 per step: blocks take several hops |

So the all-gather is good for small blocks, and the all-to-all only for those: pairwise sends each block once.

What rank 0 of 5 has in an all-gather; blocks travel to lower ranks::

    start                                0
    step 1   from rank 1: its block      0 1
    step 2   from rank 2: two blocks     0 1 2 3
    step 3   from rank 4: one block      0 1 2 3 4
"""

from collections.abc import Iterator

from minidist.schedule import Recv, Send, Step, alike, num_chunks


@alike
def bruck_all_gather(rank: int, world_size: int) -> Iterator[Step]:
    """Send all that is there to rank - 1, 2, 4, ..., as one message."""
    held = 1
    while held < world_size:
        blocks = range(min(held, world_size - held))
        yield (
            Send((rank - held) % world_size, [(rank + block) % world_size for block in blocks]),
            Recv((rank + held) % world_size, [(rank + held + block) % world_size for block in blocks]),
        )
        held *= 2


@num_chunks(lambda world_size: 3 * world_size)
@alike
def bruck_all_to_all(rank: int, world_size: int) -> Iterator[Step]:
    """Move the block for the rank at distance d by 1, 2, 4, ..., by every power of two that is in d."""
    distance = 1
    while distance < world_size:
        moving = [far for far in range(1, world_size) if far & distance]
        yield (
            Send((rank + distance) % world_size, [_place(far, distance, rank, world_size) for far in moving]),
            Recv((rank - distance) % world_size, [_place(far, 2 * distance, rank, world_size) for far in moving]),
        )
        distance *= 2


def _place(far: int, distance: int, rank: int, world_size: int) -> int:
    """Return where a block waits that has ``far`` to go in all, and has moved by the bits of it below ``distance``."""
    moved = (far & (distance - 1)).bit_count()
    if moved == 0:  # a block of the input
        return (rank + far) % world_size
    # A step cannot receive into what it sends, so a block changes between scratch and the output, where it ends.
    in_scratch = (far.bit_count() - moved) % 2
    return 2 * world_size + far if in_scratch else world_size + (rank - far) % world_size
