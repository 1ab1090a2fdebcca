"""What the ranks of one host share: their heaps, and in each a place to meet, a small stage, and slots for mail.

Ranks meet at one counter each: a rank adds one to its own and waits until the others' are as high. With the counter
it publishes a *ticket*: the signature of what it means to do, and the offset of a tensor in its heap. Two tickets are
used in turn. A rank can be one meeting ahead of another and not two, so it never overwrites what is still read.
"""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from backends import cores
from backends.processes.signature import MEETING, difference
from backends.shm import mailbox
from backends.shm.doorbell import Doorbell
from backends.shm.heap import Heap, OwnHeap, attach, unreachable
from backends.shm.mailbox import LINE, Mailbox
from minidist import launch
from minidist.errors import BackendUnavailableError, MismatchError

INLINE_BYTES = 2**14
"""What is so small that copying it costs less than a second meeting."""
STAGE_BYTES = 2**22
"""Twice as much per rank: in smaller ones ranks spend more time on meetings, larger ones gained nothing."""
BELL, COUNT, TICKET, SECRET = 0, LINE, 2 * LINE, 3 * LINE
"""Words of a rank: its bell, its counter, two tickets, and a number that shows whose heap it is."""
NUM_WORDS = 4 * LINE
NOWHERE = -1
"""The offset of a tensor that is not in shared memory."""
POLL_S = 0.002
Obstacle = Callable[[int, float], Exception | None]


class Arena:
    """One rank's view of what all of them share.

    Args:
        rank, world_size: place in the group.
        store: a store for the ranks of this group alone.
        obstacle: called with a rank that is waited for and a deadline; returns why that is hopeless, if it is.
        deadline: for all ranks to come, on the clock of ``time.monotonic()``.
        local_world_size: how many ranks of the whole job share this host.

    Attributes:
        heap: where this rank takes memory from.
        mail: its messages.
        cores_per_rank: how many cores there are for each rank of the host.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        obstacle: Obstacle,
        deadline: float,
        local_world_size: int,
    ) -> None:
        self.rank, self.world_size, self._obstacle = rank, world_size, obstacle
        self.heap = OwnHeap()
        # The first memory of every heap, so that it lies at the same place in all of them.
        control, self._inline, self._stage, slots = (
            self.heap.reserve(size, "shm")[0]
            for size in (
                8 * (NUM_WORDS + mailbox.num_words(world_size)),
                2 * INLINE_BYTES,
                2 * STAGE_BYTES,
                mailbox.num_bytes(world_size),
            )
        )
        self.heaps = self._map_heaps(store, control, deadline, local_world_size)
        words = [heap.words(control, NUM_WORDS) for heap in self.heaps]
        self._own, self._count = words[rank], 0
        self._others = [(peer, words[peer]) for peer in range(world_size) if peer != rank]
        bells = [word[BELL : BELL + 2] for word in words]
        self._bell = Doorbell(rank, bells, [heap.base + control for heap in self.heaps], self.cores_per_rank > 0)
        self.mail = Mailbox(
            rank,
            [heap.words(control + 8 * NUM_WORDS, mailbox.num_words(world_size)) for heap in self.heaps],
            [heap.tensor(slots, mailbox.num_bytes(world_size), torch.uint8) for heap in self.heaps],
            self._bell.ring,
        )
        self._bell.expects_mail = self.mail.has_open
        self.view = functools.lru_cache(4096)(functools.partial(_view, self.heaps))
        self.meet(MEETING, NOWHERE, deadline)  # a rank that closed at once would take the address of its heap along

    def _map_heaps(self, store: dist.Store, control: int, deadline: float, local_world_size: int) -> list[Heap]:
        self.heap.words(control, NUM_WORDS)[SECRET] = secret = secrets.randbits(62)
        store.set(f"shm{self.rank}", json.dumps((self.heap.address, secret, cores.here())))
        heaps, places = list[Heap](), list[cores.Cores]()
        for rank in range(self.world_size):
            while not store.check([f"shm{rank}"]):
                if error := self._obstacle(rank, deadline):
                    raise error
                time.sleep(POLL_S)
            address, expected, place = json.loads(store.get(f"shm{rank}"))
            heap = self.heap if rank == self.rank else attach(address)
            if heap.words(control, NUM_WORDS)[SECRET] != expected:
                raise unreachable("it belongs to somebody else")
            heaps.append(heap)
            places.append(place)
        self.cores_per_rank = cores.per_rank(places, self.rank, local_world_size)
        return heaps

    @property
    def turn(self) -> int:
        """0 or 1, changing with every meeting."""
        return self._count & 1

    def inline(self, turn: int) -> int:
        """Return the offset of the memory, INLINE_BYTES, that a rank fills before the meeting of this turn."""
        return self._inline + turn * INLINE_BYTES

    def stage(self, turn: int) -> int:
        """Return the offset of one of the two stages, STAGE_BYTES each."""
        return self._stage + turn * STAGE_BYTES

    def meet(self, signature: int, offset: int, deadline: float) -> None:
        """Wait until every rank has come here as often; what it wrote before is then visible.

        Raises:
            MismatchError: a rank came with another signature.
        """
        own, ticket = self._own, TICKET + 2 * self.turn
        own[ticket], own[ticket + 1] = signature, offset
        own[COUNT] = self._count = count = self._count + 1
        self._bell.ring_all()
        for peer, words in self._others:
            if words[COUNT] < count:
                self.wait_until(functools.partial(_has_come, words, count), peer, deadline)
            if words[ticket] != signature:
                raise MismatchError(difference(self.rank, signature, peer, words[ticket]))

    def exchange(self, signature: int, offset: int, deadline: float) -> tuple[int, ...]:
        """Meet, and return the offsets that the ranks came with."""
        ticket = TICKET + 1 + 2 * self.turn
        self.meet(signature, offset, deadline)
        offsets = [words[ticket] for _, words in self._others]
        offsets.insert(self.rank, offset)
        return tuple(offsets)

    def wait_until(
        self, ready: Callable[[], bool], peer: int, deadline: float, obstacle: Obstacle | None = None
    ) -> None:
        """Wait for something that ``peer`` has to do; meanwhile, move messages that can be moved."""

        def hopeless() -> Exception | None:
            mailbox.advance_all()
            return (obstacle or self._obstacle)(peer, deadline)

        self._bell.wait(ready, hopeless)

    def close(self) -> None:
        """Give back the address of the heap; its memory goes when nothing in it is used any more."""
        self.heap.close()
        self._bell.forget_mail()


def ensure_one_host(world: launch.World) -> None:
    """Raise BackendUnavailableError if the ranks are known to be on several hosts."""
    if world.knows_host and world.local_world_size != world.world_size:
        raise BackendUnavailableError(
            f"shm joins the ranks of one host, but of these {world.world_size} ranks only "
            f"{world.local_world_size} are on this one; use comm=ring or comm=gloo"
        )


def _view(heaps: list[Heap], rank: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    return heaps[rank].tensor(offset, numel, dtype)


def _has_come(words: memoryview, count: int) -> bool:
    return words[COUNT] >= count
