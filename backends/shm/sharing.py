"""All collectives of shared memory but the all-reduce: each rank *offers* a tensor, and reads what the others offer.

Who offers what and who reads which of it is all that they differ in::

    broadcast        the root offers all of it           the others read it
    all_gather       each rank offers its input          all read all of them
    reduce_scatter   each rank offers n pieces           rank r reads piece r of each, and combines them
    all_to_all       each rank offers n pieces           rank r reads piece r of each
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backends.deadline import Deadline
from backends.executor.reductions import combine
from backends.processes.offer import Offer, Read
from backends.processes.signature import MEETING
from backends.shm.arena import BLOCK_BYTES, Arena
from backends.shm.layout import INLINE_BYTES, NOWHERE
from backends.shm.stage import Stage, run_rounds


def share(arena: Arena, offer: Offer, reads: Sequence[Read], deadline: Deadline) -> None:
    """Offer something to the other ranks, and read what they offer; all ranks call it.

    A target may be the source itself; what is read from there has to be the first of its parts.
    """
    if offer.nbytes <= INLINE_BYTES:
        return _share_inline(arena, offer, reads, deadline)
    offset = NOWHERE if offer.source is None else arena.heap.offset_of(offer.source)
    offsets = arena.gather_offsets(offer.signature, offset, deadline)
    # All ranks have to go the same way, and know the same offsets. A rank that only reads offers nothing anywhere.
    offered = offsets if offer.is_everyones else offsets[offer.root : offer.root + 1]
    if NOWHERE in offered:
        return _share_staged(arena, offer, reads, deadline)
    _read_in_place(arena, offer, reads, offsets)
    return arena.meet(MEETING, NOWHERE, deadline)  # before it, others may still read from the source


def _share_inline(arena: Arena, offer: Offer, reads: Sequence[Read], deadline: Deadline) -> None:
    like = offer.like
    inline = arena.inline(arena.turn)
    if offer.source is not None:
        arena.view(arena.rank, inline, like.numel() * offer.num_pieces, like.dtype).copy_(offer.source)
    arena.meet(offer.signature, NOWHERE, deadline)
    for target, parts in reads:
        views = [arena.view(rank, inline + piece * like.nbytes, like.numel(), like.dtype) for rank, piece in parts]
        combine(offer.op, views, target)


def _read_in_place(arena: Arena, offer: Offer, reads: Sequence[Read], offsets: Sequence[int]) -> None:
    like = offer.like
    for target, parts in reads:
        places = [(rank, offsets[rank] + piece * like.nbytes) for rank, piece in parts]
        views = [arena.view(rank, place, like.numel(), like.dtype) for rank, place in places]
        cut = [torch.split(view, BLOCK_BYTES // like.dtype.itemsize) for view in (target, *views)]
        for block, *others in zip(*cut, strict=True):
            combine(offer.op, others, block)


def _share_staged(arena: Arena, offer: Offer, reads: Sequence[Read], deadline: Deadline) -> None:
    stage = Stage(arena, offer.num_pieces, offer.like.dtype)
    source = () if offer.source is None else torch.split(offer.source, offer.like.numel())
    pieces = [stage.pieces_of(piece) for piece in source]
    targets = [(stage.pieces_of(target), parts) for target, parts in reads]

    def stage_pieces(k: int) -> None:
        for index, piece in enumerate(pieces):
            stage.piece(arena.rank, k, index, piece[k]).copy_(piece[k])

    def read_pieces(k: int) -> None:
        for target, parts in targets:
            combine(offer.op, [stage.piece(rank, k, index, target[k]) for rank, index in parts], target[k])

    run_rounds(arena, -(-offer.like.numel() // stage.numel), (stage_pieces, read_pieces), deadline)
