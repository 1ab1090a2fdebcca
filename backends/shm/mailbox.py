"""Send and receive through shared memory: for every pair of ranks a ring of slots that the sender fills.

A message is cut into pieces of a slot's size. The sender copies a piece into the next free slot and counts it
as *sent*; the receiver copies it out and counts it as *taken*. Each count has one writer, so nothing is locked::

    slots of rank 0 to rank 1    |  7  |  4  |  5  |  6  |       sent by rank 0: 8, taken by rank 1: 5

Nothing moves by itself: whoever waits for anything also moves what else can be moved (`Mailbox.advance`).
Messages of one pair leave in order, and those whose tag nobody expects yet are kept in memory of the receiver.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidist.contract.checks import DTYPES
from minidist.contract.envelope import received
from minidist.contract.forks import Living
from minidist.errors import MismatchError

NUM_SLOTS = 4
SLOT_BYTES = 2**17
LINE = 8
"""Words in a cache line; a word that is waited for has one of its own."""


_mailboxes: Living[Mailbox] = Living()
"""All mailboxes of this process: a rank that waits on one communicator moves the messages of the others too."""


def num_words(world_size: int) -> int:
    """Return how many words a rank's mailbox needs: two counts and the slots' headers, for every peer."""
    return LINE * world_size * (2 + NUM_SLOTS)


def num_bytes(world_size: int) -> int:
    """Return how much memory the slots of a rank take."""
    return world_size * NUM_SLOTS * SLOT_BYTES


def advance_all() -> None:
    """Move what can be moved in every mailbox of this process."""
    for each in _mailboxes.all():
        each.advance()


class Letter:
    """A message as one side sees it.

    Attributes:
        memory: 1-d, bytes: what is sent, or where it goes.
        tag: as the user of the mailbox chose it.
        dtype: what the bytes are.
        done: whether all of it has been copied out of, or into, its memory.
        error: what was wrong with it, once it is done.
    """

    def __init__(self, memory: Tensor, tag: int, dtype: torch.dtype) -> None:
        self.memory, self.tag, self.dtype, self.nbytes = memory, tag, dtype, memory.numel()
        self.done, self.num_moved = False, 0
        self.error: MismatchError | None = None
        self.heir: Letter | None = None  # the receive whose memory this message could not go into at once

    @property
    def kind(self) -> tuple[int, torch.dtype]:
        """How many elements of which dtype it is."""
        return self.nbytes // self.dtype.itemsize, self.dtype

    def take_from(self, slot: Tensor, length: int) -> None:
        """Copy the next ``length`` bytes from a slot."""
        self.memory[self.num_moved : self.num_moved + length].copy_(slot[:length])
        self._moved(length)

    def put_into(self, slot: Tensor, length: int) -> None:
        """Copy the next ``length`` bytes into a slot."""
        slot[:length].copy_(self.memory[self.num_moved : self.num_moved + length])
        self._moved(length)

    def _moved(self, length: int) -> None:
        self.num_moved += length
        self.done = self.num_moved == self.nbytes  # after the copy: another thread may ask

    def is_for(self, heir: Letter, src: int) -> None:
        """Remember the receive that gets it once it is complete; tell it at once where it is another one's kind."""
        if heir.kind == self.kind:
            self.heir = heir
        else:
            heir.error = MismatchError(received(src, *self.kind, *heir.kind))
            heir.done = True

    def deliver(self) -> None:
        """Hand what is complete over to its heir."""
        if self.heir is not None:
            self.heir.memory.copy_(self.memory)
            self.heir.done = True


class _Exchange:
    """The mail between this rank and one other."""

    def __init__(self) -> None:
        self.outgoing: deque[Letter] = deque()
        self.expected: dict[int, deque[Letter]] = defaultdict(deque)
        self.early: dict[int, deque[Letter]] = defaultdict(deque)
        self.opened: Letter | None = None
        self.num_expected = 0


class Mailbox:
    """The mail of one rank.

    Args:
        rank: the rank of this process.
        words: per rank the words of its mailbox.
        slots: per rank its slots: `num_bytes` bytes, NUM_SLOTS of SLOT_BYTES for each destination.
        ring: called with the rank that may have waited for what was moved.
    """

    def __init__(
        self, rank: int, words: Sequence[memoryview], slots: Sequence[Tensor], ring: Callable[[int], None]
    ) -> None:
        self._rank, self._words, self._ring = rank, words, ring
        self._slots = [list(slot.view(len(words) * NUM_SLOTS, SLOT_BYTES)) for slot in slots]
        # Words: what was sent to each rank, what was taken from each, and (tag, bytes, bytes in it, dtype) of a slot.
        self._taken, self._headers = LINE * len(words), 2 * LINE * len(words)
        self._exchanges = [_Exchange() for _ in words]
        self._lock = threading.Lock()
        self._num_open = 0
        _mailboxes.add(self)

    def has_open(self) -> bool:
        """Whether messages of this rank are under way."""
        return self._num_open > 0

    def has_sent(self, dst: int) -> bool:
        """Whether all that was to go to ``dst`` is in its slots or taken; moves what can be moved."""
        self.advance()
        return not self._exchanges[dst].outgoing

    def send(self, memory: Tensor, dst: int, tag: int, dtype: torch.dtype = torch.uint8) -> Letter:
        """Start to send bytes, which are elements of ``dtype``."""
        letter = Letter(memory, tag, dtype)
        with self._lock:
            self._exchanges[dst].outgoing.append(letter)
            self._num_open += 1
        self.advance()
        return letter

    def receive(self, memory: Tensor, src: int, tag: int, dtype: torch.dtype = torch.uint8) -> Letter:
        """Start to receive bytes, which are elements of ``dtype``."""
        letter, exchange = Letter(memory, tag, dtype), self._exchanges[src]
        with self._lock:
            if not exchange.early[tag]:
                exchange.expected[tag].append(letter)
                self._expect(exchange, 1)
            else:
                early = exchange.early[tag].popleft()
                early.is_for(letter, src)
                if early.done:
                    early.deliver()
                else:
                    self._expect(exchange, 1)
        return letter

    def advance(self) -> None:
        """Move what can be moved now."""
        if not self._num_open:
            return
        with self._lock:
            for peer, exchange in enumerate(self._exchanges):
                while exchange.outgoing and self._push(peer, exchange):
                    pass
                while exchange.num_expected and self._pull(peer, exchange):
                    pass

    def _push(self, dst: int, exchange: _Exchange) -> bool:
        """Fill a slot, if one is free."""
        own, letter = self._words[self._rank], exchange.outgoing[0]
        sent = own[LINE * dst]
        if sent - self._words[dst][self._taken + LINE * self._rank] == NUM_SLOTS:
            return False
        slot = dst * NUM_SLOTS + sent % NUM_SLOTS
        length = min(letter.nbytes - letter.num_moved, SLOT_BYTES)
        letter.put_into(self._slots[self._rank][slot], length)
        header = self._headers + LINE * slot
        own[header], own[header + 1], own[header + 2] = letter.tag, letter.nbytes, length
        own[header + 3] = DTYPES.index(letter.dtype)
        own[LINE * dst] = sent + 1
        self._ring(dst)
        if letter.done:
            exchange.outgoing.popleft()
            self._num_open -= 1
        return True

    def _pull(self, src: int, exchange: _Exchange) -> bool:
        """Empty a slot, if one is full."""
        own, theirs = self._words[self._rank], self._words[src]
        taken = own[self._taken + LINE * src]
        if theirs[LINE * self._rank] == taken:
            return False
        slot = self._rank * NUM_SLOTS + taken % NUM_SLOTS
        header = self._headers + LINE * slot
        if exchange.opened is None:
            exchange.opened = _open(exchange, src, theirs[header], theirs[header + 1], DTYPES[theirs[header + 3]])
        letter, length = exchange.opened, theirs[header + 2]
        letter.take_from(self._slots[src][slot], length)
        own[self._taken + LINE * src] = taken + 1
        if theirs[LINE * self._rank] - taken == NUM_SLOTS:  # looked at last, or the sender may have filled it since
            self._ring(src)
        if letter.done:
            exchange.opened = None
            letter.deliver()
            if letter not in exchange.early[letter.tag]:
                self._expect(exchange, -1)
        return True

    def _expect(self, exchange: _Exchange, change: int) -> None:
        exchange.num_expected += change
        self._num_open += change


def _open(exchange: _Exchange, src: int, tag: int, nbytes: int, dtype: torch.dtype) -> Letter:
    """Return where the message that begins now goes."""
    heir = exchange.expected[tag].popleft() if exchange.expected[tag] else None
    if heir is not None and (heir.nbytes, heir.dtype) == (nbytes, dtype):
        return heir
    letter = Letter(torch.empty(nbytes, dtype=torch.uint8, device="cpu"), tag, dtype)
    if heir is None:
        exchange.early[tag].append(letter)
    else:
        letter.is_for(heir, src)
    return letter
