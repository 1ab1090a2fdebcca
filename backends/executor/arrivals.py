"""What becomes of a message that has come: it is put where it belongs, or combined with what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from backends.executor.program import Message
from backends.executor.reductions import COMBINE
from minidist.communicator import ReduceOp
from minidist.contract.work import Work


@dataclass(slots=True)
class Arrival:
    """A message on its way.

    Attributes:
        work: ends when it has come.
        message: what it is.
        memory: what it comes into.
    """

    work: Work
    message: Message
    memory: Tensor

    def pieces(self) -> Iterator[tuple[Tensor, int]]:
        """Yield each part of what is not where it belongs, and its place."""
        message = self.message
        if message.in_place:
            return
        runs = message.runs
        parts = (self.memory,) if len(runs) == 1 else self.memory.split_with_sizes(list(message.numels))
        yield from zip(parts, runs, strict=True)


def store(arrival: Arrival, places: Sequence[Tensor], rank: int, op: ReduceOp) -> None:
    """Wait for a message and put it where it belongs; of two values that are combined, the lower rank's comes first."""
    arrival.work.wait()
    for piece, index in arrival.pieces():
        place = places[index]
        if not arrival.message.reduces:
            place.copy_(piece)
        elif arrival.message.peer < rank:
            COMBINE[op](piece, place, out=place)
        else:
            COMBINE[op](place, piece, out=place)


def store_in_order(arrivals: Sequence[Arrival], places: Sequence[Tensor], rank: int, op: ReduceOp) -> None:
    """Wait for the messages of a step in which several are reduced into one place, and put them there.

    A sum of floats depends on the order of its terms. So that ranks that combine the same values get the same bits,
    all take them in the order of the ranks, the value of ``rank`` itself at its own place: those of lower ranks are
    combined in scratch, in the message that came first, until the last of them is there and the own value follows.
    """
    both = COMBINE[op]
    sums = dict[int, Tensor]()
    # By place: how many values of lower ranks are still to come before the own one.
    lower = Counter(run for arrival in arrivals if arrival.message.peer < rank for run in arrival.message.runs)
    for arrival in sorted(arrivals, key=lambda arrival: arrival.message.peer):
        arrival.work.wait()
        for piece, index in arrival.pieces():
            place = places[index]
            if not arrival.message.reduces:
                place.copy_(piece)
            elif arrival.message.peer > rank:
                both(place, piece, out=place)
            else:
                sums[index] = both(sums[index], piece, out=piece) if index in sums else piece
                lower[index] -= 1
                if not lower[index]:
                    both(sums[index], place, out=place)
