"""What a backend is told that reduces gradients, steps their parameters and gives them to all ranks in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """The step of some neighbouring elements.

    Attributes:
        start: the first of them in this rank's share.
        states: one or two tensors of the optimizer, 1-d and as long as the row, in memory of this rank.
        numbers: what the arithmetic needs, see `minidist.gradients.fused`.
        numel: how many they are.
    """

    start: int
    numel: int
    states: tuple[Tensor, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class FusedStep:
    """The step of one bucket.

    Attributes:
        kind: ``sgd`` or ``adam``.
        divisor: what the sum of the gradients is divided by.
        memory: all gradients, to be added up over the ranks, and then all values, which are written on all of them;
            1-d, from the communicator's `empty`. Each half is cut into a share for each rank.
        rows: of this rank's share, in its order.
    """

    kind: str
    divisor: int
    memory: Tensor
    rows: Sequence[Row]
