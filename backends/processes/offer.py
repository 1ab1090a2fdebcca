"""What a rank brings to a collective, where ranks read what the others offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backends.processes.signature import signature
from minidist.collective import COLLECTIVES
from minidist.communicator import ReduceOp

Read = tuple[Tensor, Sequence[tuple[int, int]]]
"""A target, and the parts that are combined into it: (rank, which piece of that rank's source)."""


@dataclass(slots=True)
class Offer:
    """What a rank brings to a collective.

    Attributes:
        kind: its name.
        like: as large as one piece; the same on all ranks.
        source: what is offered; None from a rank that only reads.
        num_pieces: how many pieces the source has.
        op: of a reduction.
        root: of what has one.
    """

    kind: str
    like: Tensor
    source: Tensor | None
    num_pieces: int = 1
    op: ReduceOp = ReduceOp.SUM
    root: int = 0

    @property
    def signature(self) -> int:
        """What ranks that meet compare."""
        return signature(self.kind, self.like, self.op, self.root)

    @property
    def nbytes(self) -> int:
        """Of all its pieces."""
        return self.like.nbytes * self.num_pieces

    @property
    def is_everyones(self) -> bool:
        """Whether every rank has a source; of some collectives only the root has one."""
        return COLLECTIVES[self.kind].root != "source"
