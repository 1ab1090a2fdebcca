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

Ranks meet at one counter each: a rank adds one to its own and waits until the others' are as high. With the
counter each rank publishes a word that tells which collective it means and on how much of what, so that ranks
that disagree all raise `MismatchError`. Small tensors travel with the counter: one meeting is all that they need.

Cost of an all-reduce of M bytes on n ranks: 2 meetings in place, in which every rank reads and writes (n-1)/n M of
the others' memory; about 2 + M / (n STAGE_BYTES / (n+1)) meetings, and twice the traffic, through the stage.
The scheme is the one of Li, Hoefler and Snir, "NUMA-aware shared-memory collective communication for MPI" (2013).
"""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends import cores, doorbell, mailbox
from backends.doorbell import Doorbell
from backends.heap import Heap, OwnHeap, attach, unreachable
from backends.mailbox import Letter, Mailbox
from backends.processes import Place, ProcessCommunicator
from backends.reductions import combine
from minidist import checks, launch
from minidist.communicator import Device, ReduceOp, Shape, Work
from minidist.errors import (
    BackendUnavailableError,
    CommError,
    CommTimeoutError,
    MismatchError,
    PeerLostError,
)

BLOCK_BYTES = 2**17
"""What is added at a time: two or three such blocks stay in a core's cache."""
INLINE_BYTES = 2**14
"""What is so small that copying it costs less than a second meeting."""
STAGE_BYTES = 2**19
LINE = mailbox.LINE
BELL, COUNT, TICKET, SECRET = 0, LINE, 2 * LINE, 3 * LINE
"""Words of a rank: its bell, its counter, two tickets (signature, offset) that are used in turn, and a secret."""
NUM_WORDS = 4 * LINE
KINDS = (
    "barrier",
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "gather",
    "scatter",
    "all_to_all",
)
OPS = tuple(ReduceOp)
SUM = ReduceOp.SUM
NOWHERE = -1
"""The offset of a tensor that is not in shared memory."""

ROOTED_SOURCE = ("broadcast", "scatter")
"""What only the root offers something to."""

Blocks = list[tuple[Tensor, list[Tensor]]]
"""This rank's chunk of a tensor, block by block, each with the other ranks' copies of it."""
Read = tuple[Tensor, Sequence[tuple[int, int]]]
"""A target, and the parts that are combined into it: (rank, which piece of that rank's source)."""


class ShmCommunicator(ProcessCommunicator):
    """Shared memory, for ranks that are processes of one host; started by torchrun or mpirun."""

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        super().__init__(timeout_s, segment_bytes, place)
        self._heap = OwnHeap()
        n = self.world_size
        # The first memory of every heap, so that it lies at the same place in all of them.
        sizes = (
            8 * (NUM_WORDS + mailbox.num_words(n)),
            2 * INLINE_BYTES,
            2 * STAGE_BYTES,
            n * mailbox.NUM_SLOTS * mailbox.SLOT_BYTES,
        )
        control, self._inline, self._stage, slots = (self._heap.reserve(size, "shm")[0] for size in sizes)
        self._heaps, cores_per_rank = self._meet_heaps(control)
        # A helper thread on the core of its rank made steps 2 to 8 % slower than to communicate in between.
        self.overlaps = cores_per_rank > 1
        words = [heap.words(control, NUM_WORDS) for heap in self._heaps]
        self._own = words[self.rank]
        self._others = [(peer, words[peer]) for peer in range(n) if peer != self.rank]
        self._count = 0
        bells = [word[BELL : BELL + 2] for word in words]
        self._bell = Doorbell(self.rank, bells, [heap.base + control for heap in self._heaps], cores_per_rank > 0)
        mail_words = [heap.words(control + 8 * NUM_WORDS, mailbox.num_words(n)) for heap in self._heaps]
        mail_slots = [heap.tensor(slots, sizes[3], torch.uint8) for heap in self._heaps]
        self._mail = Mailbox(self.rank, mail_words, mail_slots, self._bell.ring)
        self._meet(
            0, NOWHERE, time.monotonic() + timeout_s
        )  # a rank that closes at once takes its heap's address along
        self._view = functools.lru_cache(4096)(self._make_view)
        self._inline_parts = functools.lru_cache(256)(self._make_inline_parts)
        self._blocks = functools.lru_cache(64)(self._make_blocks)

    @classmethod
    def check_available(cls) -> None:
        doorbell.check_available()
        world = launch.detect()
        if world.local_world_size != world.world_size:
            raise BackendUnavailableError(
                f"shm joins the ranks of one host, but of these {world.world_size} ranks only "
                f"{world.local_world_size} are on this one; use comm=ring or comm=gloo"
            )

    def _meet_heaps(self, control: int) -> tuple[list[Heap], int]:
        """Map the heaps of all ranks; also return how many cores there are for each of them."""
        self._heap.words(control, NUM_WORDS)[SECRET] = secret = secrets.randbits(62)
        hello = (self._heap.address, secret, cores.here())
        self._store.set(f"shm{self.rank}", json.dumps(hello))
        heaps, places = list[Heap](), list[cores.Cores]()
        for rank in range(self.world_size):
            address, expected, place = json.loads(self._store.get(f"shm{rank}"))
            heap = self._heap if rank == self.rank else attach(address)
            if heap.words(control, NUM_WORDS)[SECRET] != expected:
                raise unreachable("it belongs to somebody else")
            heaps.append(heap)
            places.append(place)
        return heaps, cores.per_rank(places, self.rank)

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        if device is not None and torch.device(device).type != "cpu":
            return super().empty(shape, dtype, device)
        self.ensure_usable("empty")
        sizes = torch.Size([shape] if isinstance(shape, int) else shape)
        return self._heap.take(sizes.numel(), dtype, self.who("empty")).view(sizes)

    # Collectives ------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self.traffic.count(tensor.nbytes)
        deadline = time.monotonic() + timeout_s
        flat = tensor if tensor.dim() == 1 else tensor.view(-1)
        if flat.nbytes <= INLINE_BYTES:
            own, parts, signature = self._inline_parts(self._count & 1, flat.numel(), flat.dtype, op)
            own.copy_(flat)
            self._meet(signature, NOWHERE, deadline)
            return combine(op, parts, flat)
        offsets = self._begin("all_reduce", flat, flat, op, 0, deadline)
        if NOWHERE in offsets:
            return self._all_reduce_staged(flat, op, deadline)
        add_and_write(self._blocks(offsets, flat.numel(), flat.dtype), op)
        self._meet(0, NOWHERE, deadline)

    def _all_reduce_staged(self, flat: Tensor, op: ReduceOp, deadline: float) -> None:
        n, me = self.world_size, self.rank
        others = [rank for rank in range(n) if rank != me]
        stage = _Stage(self, n + 1, flat.dtype)  # the last piece holds the result
        pieces = [torch.split(chunk, stage.numel) if chunk.numel() else () for chunk in self._cut(flat)]

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
        # Its own part first: it is overwritten by the sum with the second one.
        ranks = sorted(range(self.world_size), key=lambda rank: rank != dst)
        reads = [(flat, [(rank, 0) for rank in ranks])] if self.rank == dst else []
        self._exchange("reduce", flat, flat, reads, timeout_s, op=op, root=dst)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        flat = tensor.view(-1)
        if self.rank == src:
            self._exchange("broadcast", flat, flat, [], timeout_s, root=src)
        else:
            self._exchange("broadcast", flat, None, [(flat, [(src, 0)])], timeout_s, root=src)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        reads = [(chunk, [(rank, 0)]) for rank, chunk in enumerate(self._cut(output))]
        self._exchange("all_gather", input, input.view(-1), reads, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        reads = [(output.view(-1), [(rank, self.rank) for rank in range(self.world_size)])]
        self._exchange("reduce_scatter", output, input.view(-1), reads, timeout_s, self.world_size, op)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        chunks = [] if output is None else self._cut(output)
        reads = [(chunk, [(rank, 0)]) for rank, chunk in enumerate(chunks)]
        self._exchange("gather", input, input.view(-1), reads, timeout_s, root=dst)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        source = None if input is None else input.view(-1)
        reads = [(output.view(-1), [(src, self.rank)])]
        self._exchange("scatter", output, source, reads, timeout_s, self.world_size, root=src)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        chunks = self._cut(output)
        reads = [(chunk, [(rank, self.rank)]) for rank, chunk in enumerate(chunks)]
        self._exchange("all_to_all", chunks[0], input.view(-1), reads, timeout_s, self.world_size)

    def _barrier(self, timeout_s: float) -> None:
        self.traffic.count(0)
        self._meet(0, NOWHERE, time.monotonic() + timeout_s)

    def shared_blocks(self, tensor: Tensor) -> Blocks:
        """Return what this rank works on in an all-reduce of ``tensor``, which came from `empty` on every rank.

        Every rank calls it. For measurements, and for collectives that others write.
        """
        self.ensure_usable("shared_blocks")
        offsets = self._begin("all_reduce", tensor, tensor, SUM, 0, time.monotonic() + self.timeout_s)
        return self._blocks(offsets, tensor.numel(), tensor.dtype)

    # How they work ----------------------------------------------------------------------------

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
        deadline = time.monotonic() + timeout_s
        self.traffic.count(0 if source is None else source.nbytes)
        numel, dtype = like.numel(), like.dtype
        if like.nbytes * num_pieces <= INLINE_BYTES:
            inline = self._inline + (self._count & 1) * INLINE_BYTES
            if source is not None:
                self._view(self.rank, inline, numel * num_pieces, dtype).copy_(source)
            self._meet(_signature(kind, like, op, root), NOWHERE, deadline)
            for target, parts in reads:
                views = [self._view(rank, inline + piece * like.nbytes, numel, dtype) for rank, piece in parts]
                combine(op, views, target)
            return None
        offsets = self._begin(kind, like, source, op, root, deadline)
        if NOWHERE in (offsets[root : root + 1] if kind in ROOTED_SOURCE else offsets):
            return self._exchange_staged(like, source, reads, deadline, num_pieces, op)
        for target, parts in reads:
            views = [self._view(rank, offsets[rank] + piece * like.nbytes, numel, dtype) for rank, piece in parts]
            cut = [torch.split(view, BLOCK_BYTES // dtype.itemsize) for view in (target, *views)]
            for block, *others in zip(*cut, strict=True):
                combine(op, others, block)
        return self._meet(0, NOWHERE, deadline)

    def _exchange_staged(
        self,
        like: Tensor,
        source: Tensor | None,
        reads: Sequence[Read],
        deadline: float,
        num_pieces: int,
        op: ReduceOp,
    ) -> None:
        stage = _Stage(self, num_pieces, like.dtype)
        pieces = [] if source is None else [torch.split(p, stage.numel) for p in torch.split(source, like.numel())]
        targets = [(torch.split(target, stage.numel), parts) for target, parts in reads]

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
                self._meet(0, NOWHERE, deadline)

    def _begin(
        self, kind: str, like: Tensor, source: Tensor | None, op: ReduceOp, root: int, deadline: float
    ) -> tuple[int, ...]:
        """Meet, and return where the sources of all ranks are in their heaps."""
        offset = NOWHERE if source is None else self._heap.offset_of(source)
        ticket = TICKET + 1 + 2 * (self._count & 1)
        self._meet(_signature(kind, like, op, root), offset, deadline)
        offsets = [words[ticket] for _, words in self._others]
        offsets.insert(self.rank, offset)
        return tuple(offsets)

    def _meet(self, signature: int, offset: int, deadline: float) -> None:
        """Wait until every rank has come here as often; what it wrote before is then visible."""
        own, ticket = self._own, TICKET + 2 * (self._count & 1)
        own[ticket], own[ticket + 1] = signature, offset
        own[COUNT] = self._count = count = self._count + 1
        self._bell.ring_all()
        for peer, words in self._others:
            if words[COUNT] < count:
                self.wait_until(functools.partial(_has_come, words, count), peer, deadline)
            if words[ticket] != signature:
                raise MismatchError(_difference(self.rank, signature, peer, words[ticket]))

    def wait_until(self, ready: Callable[[], bool], peer: int, deadline: float) -> None:
        """Wait for something that ``peer`` has to do."""

        def hopeless() -> Exception | None:
            self._mail.advance()
            if self._closed:
                return CommError(self._closed)
            if self._lifeline.lost:
                return self._lost()
            if peer in self._lifeline.left:
                return PeerLostError(f"rank {peer} is gone: it left the group", (peer,))
            if time.monotonic() > deadline:
                return CommTimeoutError(f"no answer from rank {peer} in time; it did not take part")
            return None

        try:
            self._bell.wait(ready, hopeless)
        except PeerLostError:
            self._report_left()
            raise

    def advance(self) -> None:
        """Move messages that can be moved now."""
        self._mail.advance()

    def staged(self, rank: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return memory of the stage of ``rank``."""
        return self._view(rank, self._stage + offset, numel, dtype)

    def _make_view(self, rank: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        return self._heaps[rank].tensor(offset, numel, dtype)

    def _make_inline_parts(
        self, turn: int, numel: int, dtype: torch.dtype, op: ReduceOp
    ) -> tuple[Tensor, list[Tensor], int]:
        """Return where this rank puts a small tensor, where all ranks put theirs, and the signature."""
        offset = self._inline + turn * INLINE_BYTES
        parts = [heap.tensor(offset, numel, dtype) for heap in self._heaps]
        return parts[self.rank], parts, _signature("all_reduce", parts[0], op, 0)

    def _make_blocks(self, offsets: tuple[int, ...], numel: int, dtype: torch.dtype) -> Blocks:
        """Return this rank's chunk in blocks, each with the other ranks' copies of it."""
        chunks = [
            self._cut(heap.tensor(o, numel, dtype))[self.rank] for heap, o in zip(self._heaps, offsets, strict=True)
        ]
        size = BLOCK_BYTES // dtype.itemsize
        own, *others = (torch.split(chunks[rank], size) for rank in (self.rank, *(peer for peer, _ in self._others)))
        return [(block, [other[k] for other in others]) for k, block in enumerate(own)]

    # Point to point ---------------------------------------------------------------------------

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return _ShmMessage(self, self._mail.send(tensor.view(-1).view(torch.uint8), dst, tag), dst, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return _ShmMessage(self, self._mail.receive(tensor.view(-1).view(torch.uint8), src, tag), src, timeout_s)

    # Life -------------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        """Nothing to do: who waits looks up often enough."""

    def _close(self) -> None:
        super()._close()
        for cache in (self._view, self._inline_parts, self._blocks):
            cache.cache_clear()
        self._heap.close()
        del self._heaps, self._mail


class _Stage:
    """The stages of all ranks, cut into ``num_pieces`` pieces of ``numel`` elements, twice."""

    def __init__(self, comm: ShmCommunicator, num_pieces: int, dtype: torch.dtype) -> None:
        self._comm, self._dtype = comm, dtype
        self.numel = STAGE_BYTES // num_pieces // 64 * 64 // dtype.itemsize

    def piece(self, rank: int, k: int, index: int, like: Tensor) -> Tensor:
        """Return a piece of ``rank``'s stage of round ``k``, as long as ``like``."""
        offset = (k & 1) * STAGE_BYTES + index * self.numel * self._dtype.itemsize
        return self._comm.staged(rank, offset, like.numel(), self._dtype)


class _ShmMessage(Work):
    """A send or receive in the mailbox."""

    def __init__(self, comm: ShmCommunicator, letter: Letter, peer: int, timeout_s: float) -> None:
        self._comm, self._letter, self._peer = comm, letter, peer
        self._deadline = time.monotonic() + timeout_s

    def wait(self) -> None:
        if not self.is_done():
            self._comm.wait_until(self.is_done, self._peer, self._deadline)
        if self._letter.error is not None:
            raise self._letter.error

    def is_done(self) -> bool:
        if not self._letter.done:
            self._comm.advance()
        return self._letter.done

    def exception(self) -> BaseException | None:
        return self._letter.error


def _has_come(words: memoryview, count: int) -> bool:
    return words[COUNT] >= count


def add_and_write(blocks: Blocks, op: ReduceOp) -> None:
    """Combine the blocks of all ranks, and write the result to all of them."""
    for own, others in blocks:
        combine(op, [own, *others], own)
        for other in others:
            other.copy_(own)


_KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(checks.DTYPES)}
_OP_CODES = {op: code for code, op in enumerate(OPS)}


def _signature(kind: str, like: Tensor, op: ReduceOp, root: int) -> int:
    """Return a word that says what a rank means to do; 0 stands for a meeting and nothing else."""
    return _KIND_CODES[kind] << 58 | _DTYPE_CODES[like.dtype] << 55 | _OP_CODES[op] << 52 | root << 40 | like.numel()


def _difference(rank: int, mine: int, peer: int, theirs: int) -> str:
    return f"rank {rank} calls {_spell(mine)}, rank {peer} calls {_spell(theirs)}; every rank has to call the same"


def _spell(signature: int) -> str:
    kind = KINDS[signature >> 58]
    if kind == "barrier":
        return kind
    dtype, op = checks.DTYPES[signature >> 55 & 7], OPS[signature >> 52 & 7]
    root, numel = signature >> 40 & 0xFFF, signature & (1 << 40) - 1
    return f"{kind} of {numel} {str(dtype).removeprefix('torch.')} with op {op.name} and root {root}"
