"""Who offers what in a collective of shared memory, and who reads which of it, in numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

Read = tuple[int, Sequence[tuple[int, int]]]
"""A block of the target, and the parts that are combined into it: (rank, which piece of what that rank offers)."""
IN_PIECES = ("reduce_scatter", "scatter", "all_to_all")


@functools.cache
def reads(kind: str, rank: int, world_size: int, root: int) -> Sequence[Read]:
    """Return what ``rank`` reads in a collective."""
    # What is read from memory that is also the target has to be read first.
    own_first = sorted(range(world_size), key=lambda other: other != rank)
    match kind:
        case "reduce":
            return [(0, [(other, 0) for other in own_first])] if rank == root else []
        case "broadcast":
            return [(0, [(root, 0)])] if rank != root else []
        case "scatter":
            return [(0, [(root, rank)])]
        case "reduce_scatter":
            return [(0, [(other, rank) for other in own_first])]
        case "all_to_all":
            return [(other, [(other, rank)]) for other in range(world_size)]
        case _:
            return (
                [(other, [(other, 0)]) for other in range(world_size)] if kind == "all_gather" or rank == root else []
            )


def num_pieces(kind: str, world_size: int) -> int:
    """Return of how many pieces what a rank offers consists."""
    return world_size if kind in IN_PIECES else 1
