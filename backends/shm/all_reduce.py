"""The all-reduce of shared memory, which training spends its communication on.

Each rank owns 1/n of the elements. It adds the other ranks' to its own, block by block while the block is in cache, and
writes the sum into theirs, so that in every element one rank adds and all get the same bits. Compare `INLINE_BYTES`:
what is smaller every rank adds for itself, in the order of the ranks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.executor.reductions import combine
from backends.processes.signature import MEETING, signature
from backends.shm.arena import BLOCK_BYTES, Arena
from backends.shm.layout import INLINE_BYTES, NOWHERE, share
from backends.shm.stage import Stage, run_rounds
from minidist.communicator import ReduceOp

Blocks = list[tuple[Tensor, list[Tensor]]]
"""This rank's chunk of a tensor, block by block, each with the other ranks' copies of it."""


class AllReduce:
    """The all-reduces of one rank, with the views of memory that they need again and again."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        # To make a view takes Python as long as a meeting. Functions, not methods, are cached: a method would hold this
        # object in a circle, and with it the mappings of all heaps until the next collection of garbage.
        self._inline_parts = functools.lru_cache(256)(functools.partial(_make_inline_parts, arena))
        self._blocks = functools.lru_cache(64)(functools.partial(_make_blocks, arena))

    def run(self, flat: Tensor, op: ReduceOp, deadline: Deadline) -> None:
        """Combine the 1-d tensors of all ranks, in place."""
        if flat.nbytes <= INLINE_BYTES:
            return self._run_inline(flat, op, deadline)
        offsets = self._meet_with(flat, op, deadline)
        if NOWHERE in offsets:
            return self._run_staged(flat, op, deadline)
        add_and_write(self._blocks(offsets, flat.numel(), flat.dtype), op)
        return self._arena.meet(MEETING, NOWHERE, deadline)  # before it, others may still write into this tensor

    def blocks(self, tensor: Tensor, deadline: Deadline) -> Blocks:
        """Return what this rank works on in an all-reduce of ``tensor``; all ranks call it."""
        offsets = self._meet_with(tensor, ReduceOp.SUM, deadline)
        blocks: Blocks = self._blocks(offsets, tensor.numel(), tensor.dtype)
        return blocks

    def _meet_with(self, flat: Tensor, op: ReduceOp, deadline: Deadline) -> tuple[int, ...]:
        word = signature("all_reduce", flat, op, 0)
        return self._arena.gather_offsets(word, self._arena.heap.offset_of(flat), deadline)

    def _run_inline(self, flat: Tensor, op: ReduceOp, deadline: Deadline) -> None:
        own, parts, word = self._inline_parts(self._arena.turn, flat.numel(), flat.dtype, op)
        own.copy_(flat)
        self._arena.meet(word, NOWHERE, deadline)
        combine(op, parts, flat)

    def _run_staged(self, flat: Tensor, op: ReduceOp, deadline: Deadline) -> None:
        n = self._arena.world_size
        me = self._arena.rank
        others = [rank for rank in range(n) if rank != me]
        stage = Stage(self._arena, n + 1, flat.dtype)  # the last piece holds the result
        pieces = [stage.pieces_of(_share(flat, n, rank)) for rank in range(n)]

        def stage_chunks(k: int) -> None:
            for rank in others:
                if k < len(pieces[rank]):
                    stage.piece(me, k, rank, pieces[rank][k]).copy_(pieces[rank][k])

        def reduce_own(k: int) -> None:
            if k < len(pieces[me]):
                own = pieces[me][k]
                combine(op, [own, *(stage.piece(rank, k, me, own) for rank in others)], own)
                stage.piece(me, k, n, own).copy_(own)

        def store_results(k: int) -> None:
            for rank in others:
                if k < len(pieces[rank]):
                    pieces[rank][k].copy_(stage.piece(rank, k, n, pieces[rank][k]))

        # The first chunk is the longest; a rank that has fewer blocks comes to all meetings nevertheless.
        run_rounds(self._arena, len(pieces[0]), (stage_chunks, reduce_own, store_results), deadline)


def add_and_write(blocks: Blocks, op: ReduceOp) -> None:
    """Combine the blocks of all ranks, and write the result to all of them."""
    for own, others in blocks:
        combine(op, [own, *others], own)
        for other in others:
            other.copy_(own)


def _make_inline_parts(
    arena: Arena, turn: int, numel: int, dtype: torch.dtype, op: ReduceOp
) -> tuple[Tensor, list[Tensor], int]:
    """Return where this rank puts a small tensor, where all ranks put theirs, and the signature."""
    parts = [heap.tensor(arena.inline(turn), numel, dtype) for heap in arena.heaps]
    return parts[arena.rank], parts, signature("all_reduce", parts[0], op, 0)


def _make_blocks(arena: Arena, offsets: tuple[int, ...], numel: int, dtype: torch.dtype) -> Blocks:
    """Return this rank's chunk of the tensors at ``offsets`` in blocks, each with the other ranks' copies of it."""
    size = BLOCK_BYTES // dtype.itemsize
    tensors = [heap.tensor(offset, numel, dtype) for heap, offset in zip(arena.heaps, offsets, strict=True)]
    chunks = [torch.split(_share(tensor, arena.world_size, arena.rank), size) for tensor in tensors]
    own = chunks.pop(arena.rank)
    return [(block, [other[k] for other in chunks]) for k, block in enumerate(own)]


def _share(flat: Tensor, world_size: int, rank: int) -> Tensor:
    """Return the elements that a rank owns."""
    begin, end = share(flat.numel(), flat.element_size(), world_size, rank)
    return flat[begin:end]
