"""What the ranks of one host share: their heaps, and in each a place to meet, a small stage, and slots for mail.

Ranks meet at one counter each: a rank adds one to its own and waits until the others' are as high. With the counter
it publishes a *ticket*: the signature of what it means to do, and the offset of a tensor in its heap::

    rank 0   count 4   tickets | of meeting 4 | of meeting 3 |     has come to the next meeting and waits there
    rank 1   count 3   tickets | of meeting 2 | of meeting 3 |     still reads the tickets of meeting 3

Two tickets are used in turn. A rank can be one meeting ahead of another and not two: it leaves meeting 4 when rank 1
has come there, and so has read what it wanted of meeting 3. So it never overwrites what is still read. That holds for
all that is used in turn: what a rank writes before a meeting, others may read until they come to the next one.

Nothing here is locked. What makes it right is that on x86-64 a core's stores are seen in their order, and its loads are
done in theirs: who sees a counter sees the ticket that was written before it, and the tensor before that. (Streaming
stores, which a large memcpy uses, are the exception; it ends with a fence for that reason.)
"""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from backends import cores
from backends.deadline import Deadline
from backends.processes.signature import MEETING, difference
from backends.shm import mailbox
from backends.shm.doorbell import Doorbell
from backends.shm.heap import Heap, OwnHeap, attach, unreachable
from backends.shm.layout import BELL, COUNT, INLINE_BYTES, NOWHERE, NUM_WORDS, SECRET, STAGE_BYTES, TICKET
from backends.shm.mailbox import Mailbox
from minidist.errors import BackendUnavailableError, MismatchError

BLOCK_BYTES = 2**17
"""What is added at a time: two or three such blocks stay in a core's cache."""
POLL_S = 0.002
WhyHopeless = Callable[[int, Deadline], Exception | None]


class _Places(NamedTuple):
    """Where in every heap is what all ranks share.

    No rank tells another where that is. A fresh heap hands out memory from its beginning, and every rank asks for the
    same sizes in the same order before anything else, so all of them find the same places. Tensors come later, and at
    places that only their rank knows; tickets tell of them.
    """

    words: int
    mail_words: int
    inline: int
    stage: int
    slots: int

    @classmethod
    def reserved_in(cls, heap: OwnHeap, world_size: int) -> _Places:
        sizes = (
            8 * NUM_WORDS,
            8 * mailbox.num_words(world_size),
            2 * INLINE_BYTES,
            2 * STAGE_BYTES,
            mailbox.num_bytes(world_size),
        )
        return cls(*(heap.reserve(size, "shm")[0] for size in sizes))


class Arena:
    """One rank's view of what all of them share.

    Args:
        rank, world_size: place in the group.
        store: a store for the ranks of this group alone.
        why_hopeless: called with a rank that is waited for and a deadline; returns why that is hopeless, if it is.
        deadline: for all ranks to come.
        local_world_size: how many ranks of the whole job share this host.
        is_beside: whether the thread that asks runs beside another one of its rank, which computes.
        compiles: whether this rank has compiled kernels.

    Attributes:
        heap: where this rank takes memory from.
        places: where in every heap is what all share.
        mail: its messages.
        cores_per_rank: how many cores there are for each rank of the host.
        compiled: whether all ranks have compiled kernels.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        why_hopeless: WhyHopeless,
        deadline: Deadline,
        local_world_size: int,
        is_beside: Callable[[], bool],
        compiles: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._why_hopeless = why_hopeless
        self._is_beside = is_beside
        self.compiled = compiles
        self.heap = OwnHeap()
        self.places = places = _Places.reserved_in(self.heap, world_size)
        self.heaps, hosts = self._map_heaps(store, deadline)
        self.cores_per_rank = cores.per_rank(hosts, rank, local_world_size)
        self.view = functools.lru_cache(4096)(functools.partial(_view, self.heaps))
        self._words = words = [heap.words(places.words, NUM_WORDS) for heap in self.heaps]
        self._own = words[rank]
        self._others = [(peer, words[peer]) for peer in range(world_size) if peer != rank]
        bells = [word[BELL : BELL + 2] for word in words]
        addresses = [heap.base + places.words + 8 * BELL for heap in self.heaps]
        self._bell = Doorbell(rank, bells, addresses)
        self.mail = self._make_mailbox()
        self._bell.expects_mail = self.mail.has_open
        # A heap is mapped by an address that holds while its rank has its file open, so nobody may close before all
        # have mapped all; a rank that closed at once would else be missing to the slower ones.
        self.meet(MEETING, NOWHERE, deadline)

    def _map_heaps(self, store: dist.Store, deadline: Deadline) -> tuple[list[Heap], list[cores.Cores]]:
        """Map the heaps of all ranks; return them, and the cores of all ranks."""
        # The address names a process by its number, which another process, or one in another container, may have too.
        # What is at the address has to know the secret, or ranks would write into memory of a stranger.
        secret = secrets.randbits(62)
        self.heap.words(self.places.words, NUM_WORDS)[SECRET] = secret
        store.set(f"shm{self.rank}", json.dumps((self.heap.address, secret, cores.here(), self.compiled)))
        heaps = list[Heap]()
        hosts = list[cores.Cores]()
        for rank in range(self.world_size):
            while not store.check([f"shm{rank}"]):
                if error := self._why_hopeless(rank, deadline):
                    raise error
                time.sleep(POLL_S)
            address, expected, host, compiles = json.loads(store.get(f"shm{rank}"))
            heap = self.heap if rank == self.rank else attach(address)
            if heap.words(self.places.words, NUM_WORDS)[SECRET] != expected:
                raise unreachable("it belongs to somebody else")
            heaps.append(heap)
            hosts.append(cores.Cores(*host))
            self.compiled &= compiles
        return heaps, hosts

    def _make_mailbox(self) -> Mailbox:
        size = mailbox.num_words(self.world_size)
        words = [heap.words(self.places.mail_words, size) for heap in self.heaps]
        nbytes = mailbox.num_bytes(self.world_size)
        slots = [heap.tensor(self.places.slots, nbytes, torch.uint8) for heap in self.heaps]
        return Mailbox(self.rank, words, slots, self._bell.ring)

    @property
    def has_core(self) -> bool:
        """Whether the thread that asks may keep a core busy while it waits: nobody else has anything to do on it."""
        return self.cores_per_rank > 1 or (self.cores_per_rank == 1 and not self._is_beside())

    @property
    def turn(self) -> int:
        """0 or 1, changing with every meeting."""
        return self._own[COUNT] & 1

    def inline(self, turn: int) -> int:
        """Return the offset of the memory, INLINE_BYTES, that a rank fills before the meeting of this turn."""
        return self.places.inline + turn * INLINE_BYTES

    def stage(self, turn: int) -> int:
        """Return the offset of one of the two stages, STAGE_BYTES each."""
        return self.places.stage + turn * STAGE_BYTES

    def meet(self, signature: int, offset: int, deadline: Deadline) -> None:
        """Wait until every rank has come here as often; what it wrote before is then visible.

        Raises:
            MismatchError: a rank came with another signature.
        """
        own = self._own
        ticket = TICKET + 2 * self.turn
        own[ticket] = signature
        own[ticket + 1] = offset
        own[COUNT] = count = own[COUNT] + 1  # after the ticket, and before the bells
        self._bell.ring_all()
        for peer, words in self._others:
            if words[COUNT] < count:
                self.wait_for_word(peer, COUNT, count, deadline, spins=True)
        self._ensure_agreed()

    def wait_for_word(self, peer: int, word: int, goal: int, deadline: Deadline, spins: bool = False) -> None:
        """Wait in the middle of a collective until a word of ``peer`` is as high as ``goal``.

        Raises:
            MismatchError: a rank has come to the latest meeting with another signature. That comes first: it is the
                cause, and to have waited in vain for a third rank is not.
        """
        self._ensure_agreed()
        ready = functools.partial(_has_reached, self._words[peer], word, goal)
        try:
            self.wait_until(ready, peer, deadline, spins=spins)
        except Exception:
            self._ensure_agreed()
            raise

    def _ensure_agreed(self) -> None:
        """Raise MismatchError if a rank that has come to this rank's latest meeting came with another signature."""
        count = self._own[COUNT]
        ticket = TICKET + 2 * (1 - self.turn)
        for peer, words in self._others:
            # In this order: before its rank had come it was the ticket of two meetings ago.
            if words[COUNT] >= count and words[ticket] != self._own[ticket]:
                raise self._mismatch(self._own[ticket], peer, words[ticket])

    def _mismatch(self, signature: int, peer: int, theirs: int) -> MismatchError:
        return MismatchError(difference(self.rank, signature, peer, theirs))

    def gather_offsets(self, signature: int, offset: int, deadline: Deadline) -> tuple[int, ...]:
        """Meet, and return the offsets that the ranks came with."""
        ticket = TICKET + 1 + 2 * self.turn  # of this meeting, which ends this turn
        self.meet(signature, offset, deadline)
        offsets = [words[ticket] for _, words in self._others]
        offsets.insert(self.rank, offset)
        return tuple(offsets)

    def wait_until(
        self,
        ready: Callable[[], bool],
        peer: int,
        deadline: Deadline,
        spins: bool = True,
    ) -> None:
        """Wait for something that ``peer`` has to do; meanwhile, move messages that can be moved."""

        def before_sleep() -> Exception | None:
            # All of this process: the peer may wait for a message on another communicator before it comes here.
            mailbox.advance_all()
            return self._why_hopeless(peer, deadline)

        self._bell.wait(ready, before_sleep, spins and self.has_core)

    def close(self) -> None:
        """Give back the address of the heap; its memory goes when nothing in it is used any more."""
        self.heap.close()
        self._bell.forget_mail()


def ensure_one_host(num_here: int, world_size: int) -> None:
    """Raise BackendUnavailableError if of so many ranks fewer are on this host."""
    if num_here != world_size:
        raise BackendUnavailableError(
            f"shm joins the ranks of one host, but of these {world_size} ranks only "
            f"{num_here} are on this one; use comm=ring or comm=gloo"
        )


def _view(heaps: list[Heap], rank: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    return heaps[rank].tensor(offset, numel, dtype)


def _has_reached(words: memoryview, word: int, goal: int) -> bool:
    return words[word] >= goal
