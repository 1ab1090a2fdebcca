"""Shared memory between the ranks of one host.

A tensor from `ShmCommunicator.empty` lies in memory that every rank has mapped, so a collective works on it in
place: in an all-reduce each rank owns 1/n of the elements, adds the other ranks' to its own, block by block while
the block is in cache, and writes the sum into theirs. Nothing is copied on the way. Other tensors pass through a
*stage*, a small piece of shared memory per rank, in rounds; what one stage of the work has written, the next one
reads in the round after it, so that all ranks meet once per round::

    round               0        1        2        3        4
    stage chunks in     block 0  block 1  block 2
    reduce own chunk             block 0  block 1  block 2
    copy results out                      block 0  block 1  block 2

Ranks that meet (backends/shm/arena.py) compare what they mean to do, so that ranks that disagree all raise
`MismatchError`. A small tensor is copied before the first meeting, which is then all that it needs.

Cost of an all-reduce of M bytes on n ranks: 2 meetings in place, in which every rank reads and writes (n-1)/n M of
the others' memory; about 2 + M / (n STAGE_BYTES / (n+1)) meetings, and twice the traffic, through the stage.
Compare Li, Hoefler and Snir, "NUMA-aware shared-memory collective communication for MPI" (2013).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.contact import ContactLostError
from backends.executor.reductions import combine
from backends.processes.communicator import Place, ProcessCommunicator
from backends.processes.signature import MEETING, signature
from backends.shm import doorbell
from backends.shm.arena import INLINE_BYTES, NOWHERE, STAGE_BYTES, Arena, ensure_one_host
from backends.shm.mailbox import Message
from minidist import launch
from minidist.communicator import Device, ReduceOp, Shape, Work
from minidist.errors import CommError, CommTimeoutError

BLOCK_BYTES = 2**17
"""What is added at a time: two or three such blocks stay in a core's cache."""
SUM = ReduceOp.SUM
ROOTED_SOURCE = ("broadcast", "scatter")
"""What only the root offers something to."""

Blocks = list[tuple[Tensor, list[Tensor]]]
"""This rank's chunk of a tensor, block by block, each with the other ranks' copies of it."""
Read = tuple[Tensor, Sequence[tuple[int, int]]]
"""A target, and the parts that are combined into it: (rank, which piece of that rank's source)."""


class ShmCommunicator(ProcessCommunicator):
    """Shared memory, for ranks that are processes of one host; started by torchrun or mpirun.

    Messages move while their sender or their receiver waits for something on shared memory, whatever it is; a
    large one does not move while both compute.
    """

    checks_sizes = checks_dtypes = True

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        super().__init__(timeout_s, segment_bytes, place)
        self._arena: Arena | None = None
        self._inline_parts: Any = None
        self._blocks: Any = None
        try:
            world = self._meeting.world
            ensure_one_host(world)
            deadline = time.monotonic() + timeout_s
            self._arena = Arena(
                self.rank, self.world_size, self._store, self.obstacle, deadline, world.local_world_size
            )
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}")
            raise
        # A helper thread on the core of its rank made steps 2 to 8 % slower than to communicate in between.
        self.overlaps = self._arena.cores_per_rank > 1
        self._inline_parts = functools.lru_cache(256)(functools.partial(_make_inline_parts, self._arena))
        self._blocks = functools.lru_cache(64)(functools.partial(_make_blocks, self._arena))

    @classmethod
    def check_available(cls) -> None:
        doorbell.check_available()
        ensure_one_host(launch.detect())

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        if device is not None and torch.device(device).type != "cpu":
            return super().empty(shape, dtype, device)
        self.ensure_usable("empty")
        sizes = torch.Size([shape] if isinstance(shape, int) else shape)
        if any(size < 0 for size in sizes):
            raise ValueError(f"{self.who('empty')}: sizes must be at least 0, got {tuple(sizes)}")
        return self._shared.heap.take(sizes.numel(), dtype, self.who("empty")).view(sizes)

    # Collectives ------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self.traffic.count(tensor.nbytes)
        deadline = time.monotonic() + timeout_s
        flat = tensor if tensor.dim() == 1 else tensor.view(-1)
        if flat.nbytes <= INLINE_BYTES:
            arena = self._shared
            own, parts, word = self._inline_parts(arena.turn, flat.numel(), flat.dtype, op)
            own.copy_(flat)
            arena.meet(word, NOWHERE, deadline)
            return combine(op, parts, flat)
        offsets = self._begin("all_reduce", flat, flat, op, 0, deadline)
        if NOWHERE in offsets:
            return self._all_reduce_staged(flat, op, deadline)
        add_and_write(self._blocks(offsets, flat.numel(), flat.dtype), op)
        self._shared.meet(MEETING, NOWHERE, deadline)

    def _all_reduce_staged(self, flat: Tensor, op: ReduceOp, deadline: float) -> None:
        n, me = self.world_size, self.rank
        others = [rank for rank in range(n) if rank != me]
        stage = _Stage(self._shared, n + 1, flat.dtype)  # the last piece holds the result
        pieces = [stage.pieces_of(chunk) for chunk in self._blocks_of(flat)]

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

        self._run_rounds(len(pieces[0]), (stage_chunks, reduce_own, store_results), deadline)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        flat = tensor.view(-1)
        reads = [(flat, [(rank, 0) for rank in self._own_rank_first()])] if self.rank == dst else []
        self._exchange("reduce", flat, flat, reads, timeout_s, op=op, root=dst)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        flat = tensor.view(-1)
        if self.rank == src:
            self._exchange("broadcast", flat, flat, [], timeout_s, root=src)
        else:
            self._exchange("broadcast", flat, None, [(flat, [(src, 0)])], timeout_s, root=src)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        reads = [(chunk, [(rank, 0)]) for rank, chunk in enumerate(self._blocks_of(output))]
        self._exchange("all_gather", input, input.view(-1), reads, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        reads = [(output.view(-1), [(rank, self.rank) for rank in self._own_rank_first()])]
        self._exchange("reduce_scatter", output, input.view(-1), reads, timeout_s, self.world_size, op)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        chunks = [] if output is None else self._blocks_of(output)
        reads = [(chunk, [(rank, 0)]) for rank, chunk in enumerate(chunks)]
        self._exchange("gather", input, input.view(-1), reads, timeout_s, root=dst)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        source = None if input is None else input.view(-1)
        reads = [(output.view(-1), [(src, self.rank)])]
        self._exchange("scatter", output, source, reads, timeout_s, self.world_size, root=src)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        chunks = self._blocks_of(output)
        reads = [(chunk, [(rank, self.rank)]) for rank, chunk in enumerate(chunks)]
        self._exchange("all_to_all", chunks[0], input.view(-1), reads, timeout_s, self.world_size)

    def _barrier(self, timeout_s: float) -> None:
        self.traffic.count(0)
        self._shared.meet(MEETING, NOWHERE, time.monotonic() + timeout_s)

    def shared_blocks(self, tensor: Tensor) -> Blocks:
        """Return what this rank works on in an all-reduce of ``tensor``, which came from `empty` on every rank.

        Every rank calls it. For measurements, and for collectives that others write.
        """
        self.ensure_usable("shared_blocks")
        if self._shared.heap.offset_of(tensor) == NOWHERE:
            raise ValueError(f"{self.who('shared_blocks')}: tensor is not in shared memory; make it with empty()")
        offsets = self._begin("all_reduce", tensor, tensor, SUM, 0, time.monotonic() + self.timeout_s)
        blocks: Blocks = self._blocks(offsets, tensor.numel(), tensor.dtype)
        return blocks

    # How they work ----------------------------------------------------------------------------

    @property
    def _shared(self) -> Arena:
        assert self._arena is not None  # it is gone once the communicator is closed, and nothing runs then
        return self._arena

    def _own_rank_first(self) -> list[int]:
        """Return all ranks; what is read from memory that is also the target has to be read first."""
        return sorted(range(self.world_size), key=lambda rank: rank != self.rank)

    def _exchange(
        self,
        kind: str,
        like: Tensor,
        source: Tensor | None,
        reads: Sequence[Read],
        timeout_s: float,
        num_pieces: int = 1,
        op: ReduceOp = SUM,
        root: int = 0,
    ) -> None:
        """Offer ``source`` to the other ranks, in ``num_pieces`` pieces like ``like``, and read what they offer."""
        arena, deadline = self._shared, time.monotonic() + timeout_s
        self.traffic.count(0 if source is None else source.nbytes)
        numel, dtype = like.numel(), like.dtype
        if like.nbytes * num_pieces <= INLINE_BYTES:
            inline = arena.inline(arena.turn)
            if source is not None:
                arena.view(self.rank, inline, numel * num_pieces, dtype).copy_(source)
            arena.meet(signature(kind, like, op, root), NOWHERE, deadline)
            for target, parts in reads:
                views = [arena.view(rank, inline + piece * like.nbytes, numel, dtype) for rank, piece in parts]
                combine(op, views, target)
            return None
        offsets = self._begin(kind, like, source, op, root, deadline)
        if NOWHERE in (offsets[root : root + 1] if kind in ROOTED_SOURCE else offsets):
            return self._exchange_staged(like, source, reads, deadline, num_pieces, op)
        for target, parts in reads:
            views = [arena.view(rank, offsets[rank] + piece * like.nbytes, numel, dtype) for rank, piece in parts]
            cut = [torch.split(view, BLOCK_BYTES // dtype.itemsize) for view in (target, *views)]
            for block, *others in zip(*cut, strict=True):
                combine(op, others, block)
        return self._shared.meet(MEETING, NOWHERE, deadline)

    def _exchange_staged(
        self,
        like: Tensor,
        source: Tensor | None,
        reads: Sequence[Read],
        deadline: float,
        num_pieces: int,
        op: ReduceOp,
    ) -> None:
        stage = _Stage(self._shared, num_pieces, like.dtype)
        pieces = [] if source is None else [stage.pieces_of(p) for p in torch.split(source, like.numel())]
        targets = [(stage.pieces_of(target), parts) for target, parts in reads]

        def stage_pieces(k: int) -> None:
            for index, piece in enumerate(pieces):
                stage.piece(self.rank, k, index, piece[k]).copy_(piece[k])

        def read_pieces(k: int) -> None:
            for target, parts in targets:
                combine(op, [stage.piece(rank, k, index, target[k]) for rank, index in parts], target[k])

        self._run_rounds(-(-like.numel() // stage.numel), (stage_pieces, read_pieces), deadline)

    def _run_rounds(self, num_rounds: int, stages: Sequence[Callable[[int], None]], deadline: float) -> None:
        """Run each stage ``num_rounds`` times, each one round behind the one before it.

        A stage may read in round k what the one before it wrote in round k - 1, and write what was read then: two
        copies of the stage's memory, used in turn, keep them apart.
        """
        last = num_rounds + len(stages) - 2
        for k in range(last + 1):
            for lag, run in enumerate(stages):
                if 0 <= k - lag < num_rounds:
                    run(k - lag)
            if k < last:
                self._shared.meet(MEETING, NOWHERE, deadline)

    def _begin(
        self, kind: str, like: Tensor, source: Tensor | None, op: ReduceOp, root: int, deadline: float
    ) -> tuple[int, ...]:
        """Meet, and return where the sources of all ranks are in their heaps."""
        offset = NOWHERE if source is None else self._shared.heap.offset_of(source)
        return self._shared.exchange(signature(kind, like, op, root), offset, deadline)

    # Point to point ---------------------------------------------------------------------------

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        message = self._shared.mail.send(tensor.view(-1).view(torch.uint8), dst, tag, tensor.dtype)
        return _ShmMessage(self, self._shared, message, dst, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        message = self._shared.mail.receive(tensor.view(-1).view(torch.uint8), src, tag, tensor.dtype)
        return _ShmMessage(self, self._shared, message, src, timeout_s)

    # Life -------------------------------------------------------------------------------------

    def obstacle(self, peer: int, deadline: float) -> Exception | None:
        """Return why it is hopeless to wait for ``peer``, if it is."""
        return CommError(self._closed) if self._closed else self._outer_obstacle(peer, deadline)

    def _outer_obstacle(self, peer: int, deadline: float) -> Exception | None:
        if self._lifeline.lost:
            return self._lost()
        if peer in self._lifeline.left:
            return ContactLostError(peer)
        if time.monotonic() > deadline:
            return CommTimeoutError(f"no answer from rank {peer} in time; it did not take part")
        return None

    def _translate(self, error: Exception) -> CommError:
        if isinstance(error, ContactLostError):
            self._report_left(error.peer)
            return self._lost()
        return super()._translate(error)

    def _interrupt(self) -> None:
        """Nothing to do: who waits looks up often enough."""

    def _close(self) -> None:
        arena, deadline = self._shared, time.monotonic() + self.timeout_s
        for peer in range(self.world_size):
            with contextlib.suppress(CommError, ContactLostError):  # a message that nobody takes any more
                arena.wait_until(functools.partial(arena.mail.has_sent, peer), peer, deadline, self._outer_obstacle)
        super()._close()
        self._let_go()

    def _abort(self, reason: str) -> None:
        super()._abort(reason)
        self._let_go()

    def _let_go(self) -> None:
        """Forget everything that keeps memory mapped; what still runs fails, as it should."""
        if self._arena is not None:
            self._arena.close()
            self._arena = self._inline_parts = self._blocks = None


class _Stage:
    """The stages of all ranks, cut into ``num_pieces`` pieces of ``numel`` elements, twice."""

    def __init__(self, arena: Arena, num_pieces: int, dtype: torch.dtype) -> None:
        self._arena, self._dtype = arena, dtype
        self.numel = STAGE_BYTES // num_pieces // 64 * 64 // dtype.itemsize

    def pieces_of(self, chunk: Tensor) -> Sequence[Tensor]:
        """Cut a chunk into what is staged in one round each."""
        if chunk.numel() <= self.numel:
            return [chunk] if chunk.numel() else []
        return torch.split(chunk, self.numel)

    def piece(self, rank: int, k: int, index: int, like: Tensor) -> Tensor:
        """Return a piece of ``rank``'s stage of round ``k``, as long as ``like``."""
        offset = self._arena.stage(k & 1) + index * self.numel * self._dtype.itemsize
        return self._arena.view(rank, offset, like.numel(), self._dtype)


class _ShmMessage(Work):
    """A send or receive in the mailbox."""

    def __init__(self, comm: ShmCommunicator, arena: Arena, message: Message, peer: int, timeout_s: float) -> None:
        self._comm, self._arena, self._message, self._peer = comm, arena, message, peer
        self._deadline = time.monotonic() + timeout_s

    def wait(self) -> None:
        if not self._has_moved():
            self._arena.wait_until(self._has_moved, self._peer, self._deadline)
        if self._message.error is not None:
            raise self._message.error

    def is_done(self) -> bool:
        return self._has_moved() or self._comm.obstacle(self._peer, self._deadline) is not None

    def exception(self) -> BaseException | None:
        return self._message.error

    def _has_moved(self) -> bool:
        if not self._message.done:
            self._arena.mail.advance()
        return self._message.done


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
    n, me, size = arena.world_size, arena.rank, BLOCK_BYTES // dtype.itemsize
    tensors = [heap.tensor(offset, numel, dtype) for heap, offset in zip(arena.heaps, offsets, strict=True)]
    chunks = [torch.split(torch.tensor_split(tensor, n)[me], size) for tensor in tensors]
    own = chunks.pop(me)
    return [(block, [other[k] for other in chunks]) for k, block in enumerate(own)]
