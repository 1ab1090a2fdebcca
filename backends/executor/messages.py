"""What the transfers of a step are in memory: messages, and where each of them belongs.

Chunks that a transfer names together travel as one message, up to ``segment_bytes``. Those that lie side by side are
one *run* of memory, which can be sent and received where it is; several runs are packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.executor.reductions import COMBINE
from minidist.communicator import ReduceOp
from minidist.contract.work import Work
from minidist.schedule import Recv, Transfer, indices


def messages(chunks: Sequence[Tensor], move: Transfer, segment_bytes: int) -> list[list[Tensor]]:
    """Return the runs of each message of a transfer; both ends cut alike, as they know the same sizes."""
    if isinstance(move.chunk, int) and chunks[move.chunk].nbytes <= segment_bytes:  # most often
        return [[chunks[move.chunk]]] if chunks[move.chunk].numel() else []
    return list(_packed(chunks, move, segment_bytes))


def _packed(chunks: Sequence[Tensor], move: Transfer, segment_bytes: int) -> Iterator[list[Tensor]]:
    """Yield messages of several chunks each, up to ``segment_bytes``, and of parts of chunks that are larger."""
    pieces = list[Tensor]()
    nbytes = 0
    for index in indices(move.chunk):
        for piece in _segments(chunks[index], segment_bytes):
            if pieces and nbytes + piece.nbytes > segment_bytes:
                yield _joined(pieces)
                pieces = []
                nbytes = 0
            pieces.append(piece)
            nbytes += piece.nbytes
    if pieces:
        yield _joined(pieces)


def _segments(chunk: Tensor, segment_bytes: int) -> Sequence[Tensor]:
    if chunk.nbytes <= segment_bytes:
        return (chunk,) if chunk.numel() else ()
    return torch.split(chunk, segment_bytes // chunk.element_size())


def _joined(pieces: list[Tensor]) -> list[Tensor]:
    """Make one of the pieces that lie side by side."""
    runs = pieces[:1]
    for piece in pieces[1:]:
        last = runs[-1]
        is_next = last.data_ptr() + last.nbytes == piece.data_ptr()
        if is_next and last.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr():
            runs[-1] = last.as_strided((last.numel() + piece.numel(),), (1,))
        else:
            runs.append(piece)
    return runs


@dataclass(slots=True)
class Arrival:
    """A message on its way.

    Attributes:
        work: ends when it has come.
        move: the transfer of which it is a part.
        message: the memory that it comes into.
        runs: the memory that it is for; nothing if it comes to where it belongs.
    """

    work: Work
    move: Transfer
    message: Tensor
    runs: Sequence[Tensor]

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each part of the message and the run that it is for."""
        parts = (self.message,) if len(self.runs) < 2 else self.message.split_with_sizes([r.numel() for r in self.runs])
        return zip(parts, self.runs, strict=False)


def store(arrival: Arrival, rank: int, op: ReduceOp) -> None:
    """Wait for a message and put it where it belongs; of two values that are combined, the lower rank's comes first."""
    arrival.work.wait()
    for piece, run in arrival.pieces():
        if isinstance(arrival.move, Recv):
            run.copy_(piece)
        elif arrival.move.peer < rank:
            COMBINE[op](piece, run, out=run)
        else:
            COMBINE[op](run, piece, out=run)


def store_in_order(arrivals: Sequence[Arrival], rank: int, op: ReduceOp) -> None:
    """Wait for the messages of a step in which several are reduced into one place, and put them there.

    A sum of floats depends on the order of its terms. So that ranks that combine the same values get the same bits,
    all take them in the order of the ranks, the value of ``rank`` itself at its own place: those of lower ranks are
    combined in scratch, in the message that came first, until the last of them is there and the own value follows.
    """
    both = COMBINE[op]
    sums = dict[int, Tensor]()
    # By place: how many values of lower ranks are still to come before the own one.
    lower = Counter(run.data_ptr() for arrival in arrivals if arrival.move.peer < rank for run in arrival.runs)
    for arrival in sorted(arrivals, key=lambda arrival: arrival.move.peer):
        arrival.work.wait()
        for piece, run in arrival.pieces():
            place = run.data_ptr()
            if isinstance(arrival.move, Recv):
                run.copy_(piece)
            elif arrival.move.peer > rank:
                both(run, piece, out=run)
            else:
                sums[place] = both(sums[place], piece, out=piece) if place in sums else piece
                lower[place] -= 1
                if not lower[place]:
                    both(sums[place], run, out=run)
