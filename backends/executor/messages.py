"""Which messages a transfer is: chunks that it names together travel as one, up to so many elements.

Those that lie side by side are one *run* of memory, which can be sent and received where it is; several runs are
packed. Both ends cut alike, as they know the same sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.executor.layout import Range
from minidist.schedule import Transfer, indices


def messages(chunks: Sequence[Range], move: Transfer, segment: int, joins: bool = True) -> Iterator[list[Range]]:
    """Yield the runs of each message of a transfer.

    Args:
        chunks: where the chunks lie.
        move: the transfer.
        segment: the most elements of a message.
        joins: whether chunks side by side become one run.
    """
    pieces = list[Range]()
    numel = 0
    for index in indices(move.chunk):
        for piece in _segments(chunks[index], segment):
            if pieces and numel + piece.numel > segment:
                yield _joined(pieces) if joins else pieces
                pieces = []
                numel = 0
            pieces.append(piece)
            numel += piece.numel
    if pieces:
        yield _joined(pieces) if joins else pieces


def _segments(chunk: Range, segment: int) -> Iterator[Range]:
    """Cut a chunk that is larger than a message."""
    for start in range(chunk.start, chunk.end, segment):
        yield Range(chunk.region, start, min(segment, chunk.end - start))


def _joined(pieces: Sequence[Range]) -> list[Range]:
    """Make one of the pieces that lie side by side."""
    runs = [pieces[0]]
    for piece in pieces[1:]:
        last = runs[-1]
        if (piece.region, piece.start) == (last.region, last.end):
            runs[-1] = last._replace(numel=last.numel + piece.numel)
        else:
            runs.append(piece)
    return runs
