"""Who steps what: the values of the parameters in flat memory, laid out like the buckets, in equal shares.

A bucket of three parameters on two ranks; what a rank steps of one parameter is a piece::

    gradients   [ a a a a a a b b | b b c c c c c - ]     bucket.flat, padded to equal shares of whole cache lines
    values      [ a a a a a a b b | b b c c c c c - ]     each parameter is a view of its place
                      rank 0             rank 1
    pieces         a, b[0:2]          b[2:4], c           one for each parameter in a rank's share

Pieces and not whole shares are what the optimizer sees: so each parameter keeps its group, its own count of steps, and
is passed over where nobody used it, as without shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidist.communicator import Communicator
from minidist.gradients.buckets import Bucket

CACHE_LINE_BYTES = 64
"""Shares begin at multiples of it, so that ranks that work in shared memory never write to the same line."""


@dataclass(frozen=True)
class Piece:
    """What this rank steps of one parameter.

    Attributes:
        values: 1-d, in the memory of the parameter.
        gradient: its mean gradient after a backward pass.
        part: which elements of the parameter they are, in the order of its memory.
    """

    values: Tensor
    gradient: Tensor
    part: slice


class ShardedBucket:
    """The values of a bucket's parameters, which live here from now on, and this rank's share of them.

    Args:
        bucket: moves to padded memory.
        comm: the ranks that have a share.

    Attributes:
        bucket: the same.
        memory: the gradients of the bucket, and then ``values``.
        values: all of them, laid out as in the bucket.
        share: this rank's block of ``values``.
        gradient: where the mean of that block's gradients goes.
        pieces: by slot in the bucket; None for a parameter that this rank has no part of.
    """

    def __init__(self, bucket: Bucket, comm: Communicator) -> None:
        dtype, device = bucket.flat.dtype, bucket.flat.device
        share_numel = _share_numel(bucket.flat, comm.world_size)
        numel, begin = share_numel * comm.world_size, share_numel * comm.rank
        self.memory = comm.empty(2 * numel, dtype, device).zero_()
        bucket.lay_out(self.memory[:numel])
        self.bucket = bucket
        self.values = self.memory[numel:]
        self.share = self.values[begin : begin + share_numel]
        self.gradient = comm.empty(share_numel, dtype, device).zero_()
        self._places = bucket.places(self.values)
        for parameter, place in zip(bucket.parameters, self._places, strict=True):
            parameter.data = place.copy_(parameter.detach())
        self.pieces = [self._piece(part) for part in parts(bucket, begin, begin + share_numel)]

    def moved(self) -> Iterator[str]:
        """Yield the names of parameters whose values are not here any more."""
        for name, parameter, place in zip(self.bucket.names, self.bucket.parameters, self._places, strict=True):
            if parameter.data_ptr() != place.data_ptr():
                yield name

    def _piece(self, cut: tuple[int, slice] | None) -> Piece | None:
        if cut is None:
            return None
        start, part = cut
        here = slice(start, start + part.stop - part.start)
        return Piece(self.share[here], self.gradient[here], part)


def _share_numel(flat: Tensor, world_size: int) -> int:
    """Return how many elements a rank's share has."""
    line = max(1, CACHE_LINE_BYTES // flat.itemsize)
    return -(-flat.numel() // (world_size * line)) * line


def parts(bucket: Bucket, begin: int, end: int) -> list[tuple[int, slice] | None]:
    """Return what of each parameter lies in ``flat[begin:end]``: where in that range, and which elements."""
    found: list[tuple[int, slice] | None] = []
    offset = 0
    for parameter in bucket.parameters:
        first = max(begin, offset)
        last = min(end, offset + parameter.numel())
        found.append((first - begin, slice(first - offset, last - offset)) if first < last else None)
        offset += parameter.numel()
    return found


class Sharding:
    """All buckets of a wrapper in shares.

    Args:
        buckets: of the wrapper; they and the parameters move into other memory.
        comm: every rank makes it together with the others.

    Attributes:
        buckets: the shares of each.
        pieces: what this rank steps, by parameter; None for one that it has no part of.
    """

    def __init__(self, buckets: Sequence[Bucket], comm: Communicator) -> None:
        self._comm = comm
        self.buckets = [ShardedBucket(bucket, comm) for bucket in buckets]
        self.pieces: dict[nn.Parameter, Piece | None] = {}
        for sharded in self.buckets:
            self.pieces |= dict(zip(sharded.bucket.parameters, sharded.pieces, strict=True))

    def moved(self) -> str | None:
        """Return the name of a parameter whose memory was replaced, if there is one."""
        return next((name for sharded in self.buckets for name in sharded.moved()), None)

    def gather(self) -> None:
        """Give every rank the values that the others have stepped."""
        comm = self._comm
        works = [comm.all_gather(each.values, each.share, async_op=comm.overlaps) for each in self.buckets]
        for work in works:
            work.wait()
        self.note_changes()

    def note_changes(self) -> None:
        """Let autograd know that the parameters have changed, which were written as other tensors."""
        torch.autograd.graph.increment_version(list(self.pieces))
