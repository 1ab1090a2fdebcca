"""Who offers what in a collective of shared memory, and who reads which of it, in numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from minidist.communicator import ReduceOp


class Call(NamedTuple):
    """A collective of one rank, but an all-reduce.

    Attributes:
        kind: its name.
        numel: of a piece of what is offered.
        source: what this rank offers, if it does; 1-d.
        target: what it reads into, if it does; 1-d.
        op, root: see `backends.processes.signature.pack`.
    """

    kind: str
    numel: int
    source: Tensor | None
    target: Tensor | None
    op: ReduceOp
    root: int

    @property
    def like(self) -> Tensor:
        """One of its tensors; a rank has at least one."""
        like = self.source if self.source is not None else self.target
        assert like is not None
        return like


Read = tuple[int, Sequence[tuple[int, int]]]
"""A block of the target, and the parts that are combined into it: (rank, which piece of what that rank offers)."""
IN_PIECES = ("reduce_scatter", "scatter", "all_to_all")


@functools.cache
def reads(kind: str, rank: int, world_size: int, root: int) -> Sequence[Read]:
    """Return what ``rank`` reads in a collective."""
    match kind:
        case "reduce":
            return [(0, [(other, 0) for other in own_first(rank, world_size)])] if rank == root else []
        case "broadcast":
            return [(0, [(root, 0)])] if rank != root else []
        case "scatter":
            return [(0, [(root, rank)])]
        case "reduce_scatter":
            return [(0, [(other, rank) for other in own_first(rank, world_size)])]
        case "all_to_all":
            return [(other, [(other, rank)]) for other in range(world_size)]
        case _:
            return (
                [(other, [(other, 0)]) for other in range(world_size)] if kind == "all_gather" or rank == root else []
            )


def own_first(rank: int, world_size: int) -> Sequence[int]:
    """Return all ranks in the order in which they are combined: memory that is also the target has to be read first."""
    return sorted(range(world_size), key=lambda other: other != rank)


def num_pieces(kind: str, world_size: int) -> int:
    """Return of how many pieces what a rank offers consists."""
    return world_size if kind in IN_PIECES else 1
