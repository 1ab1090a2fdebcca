"""Send and receive through shared memory: for every pair of ranks a ring of slots that the sender fills.

A message is cut into *pieces* of a slot's size. The sender copies a piece into the next free slot and counts it
as *sent*; the receiver copies it out and counts it as *received*. Each count has one writer, so nothing is locked::

    slots of rank 0 to rank 1    |  7  |  4  |  5  |  6  |       sent by rank 0: 8, received by rank 1: 5

Nothing moves by itself: whoever waits for anything also moves what else can be moved (`Mailbox.advance`). A rank that
has no core of its own sleeps while it waits, so it is woken for each piece that it can move (backends/shm/doorbell.py).

Messages of one pair leave in order. One whose receive is posted goes straight into the memory of the receive; an
*unexpected* one is kept in memory of its own until its receive comes. A message that is not what its receive names is
*refused*: the receiver writes so into shared memory, and the sender, which may still have most of it, drops the rest.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.shm.layout import LINE
from minidist.contract.checks import DTYPES
from minidist.contract.envelope import received, to
from minidist.contract.forks import Living
from minidist.contract.rank import ANY_SOURCE
from minidist.errors import MismatchError

NUM_SLOTS = 4
SLOT_BYTES = 2**17
NUM_LINES = 3 + NUM_SLOTS
"""Lines that a rank has for every peer: two counts, what it refused, and the headers of the slots."""
Kind = tuple[int, torch.dtype]
"""How many elements of which dtype a message has."""

_mailboxes: Living[Mailbox] = Living()
"""All mailboxes of this process: a rank that waits on one communicator moves the messages of the others too."""


def num_words(world_size: int) -> int:
    """Return how many words a rank's mailbox needs."""
    return LINE * world_size * NUM_LINES


def num_bytes(world_size: int) -> int:
    """Return how much memory the slots of a rank take."""
    return world_size * NUM_SLOTS * SLOT_BYTES


def advance_all() -> None:
    """Move what can be moved in every mailbox of this process."""
    for each in _mailboxes.all():
        each.advance()


class Message:
    """A message as one side sees it: a send, a receive, or what came before its receive.

    Attributes:
        memory: 1-d, bytes: what is sent, or where it goes.
        tag: as the user of the mailbox chose it.
        dtype: what the bytes are.
        src: of a receive, whom it comes from, once its message has begun to.
        done: whether all of it has been copied out of, or into, its memory, or it was refused.
        error: what was wrong with it, once it is done.
    """

    def __init__(self, memory: Tensor, tag: int, dtype: torch.dtype) -> None:
        self.memory = memory
        self.tag = tag
        self.dtype = dtype
        self.nbytes = memory.numel()
        self.num_moved = 0
        self.src: int | None = None
        self.done = False
        self.error: MismatchError | None = None

    @property
    def kind(self) -> Kind:
        """How many elements of which dtype it is."""
        return self.nbytes // self.dtype.itemsize, self.dtype

    def copy_from(self, slot: Tensor, length: int) -> None:
        """Copy the next ``length`` bytes from a slot."""
        self.memory[self.num_moved : self.num_moved + length].copy_(slot[:length])
        self._moved(length)

    def copy_into(self, slot: Tensor, length: int) -> None:
        """Copy the next ``length`` bytes into a slot."""
        slot[:length].copy_(self.memory[self.num_moved : self.num_moved + length])
        self._moved(length)

    def _moved(self, length: int) -> None:
        self.num_moved += length
        self.done = self.num_moved == self.nbytes  # after the copy: another thread may ask

    def fail(self, why: str) -> None:
        """End with an error."""
        self.error = MismatchError(why)
        self.done = True  # after the error, for the same reason


class _Arrival:
    """A message of which the first piece has come.

    Attributes:
        serial: its number among the messages of its sender to this rank.
        kind: what it is.
        message: where its pieces go; None where it was refused before anything was kept of it.
        receive: who gets it when it is complete; None while nobody has asked for it, and where it was refused.
    """

    def __init__(self, serial: int, kind: Kind, message: Message | None, receive: Message | None) -> None:
        self.serial = serial
        self.kind = kind
        self.message = message
        self.receive = receive

    @property
    def is_complete(self) -> bool:
        return self.message is not None and self.message.done

    def hand_over(self) -> None:
        """Give what is complete to its receive, unless it went there at once."""
        if self.receive is not None and self.message is not None and self.receive is not self.message:
            self.receive.copy_from(self.message.memory, self.message.nbytes)


class _Pair:
    """The messages between this rank and one other.

    Attributes:
        outgoing: what is not all in slots yet, in the order in which it was sent.
        num_begun: how many messages this rank has put a first piece of into a slot.
        expected: receives whose message has not begun to come, by tag.
        unexpected: what came, or began to, before its receive, by tag.
        arriving: what comes now.
        num_receives: how many receives are not done.
    """

    def __init__(self) -> None:
        self.outgoing: deque[Message] = deque()
        self.num_begun = 0
        self.expected: dict[int, deque[Message]] = defaultdict(deque)
        self.unexpected: dict[int, deque[_Arrival]] = defaultdict(deque)
        self.arriving: _Arrival | None = None
        self.num_receives = 0


class Mailbox:
    """The messages of one rank.

    Args:
        rank: the rank of this process.
        words: per rank the words of its mailbox.
        slots: per rank its slots: `num_bytes` bytes, NUM_SLOTS of SLOT_BYTES for each destination.
        ring: called with the rank that may have waited for what was moved.
    """

    def __init__(
        self, rank: int, words: Sequence[memoryview], slots: Sequence[Tensor], ring: Callable[[int], None]
    ) -> None:
        self._rank = rank
        self._words = words
        self._ring = ring
        self._slots = [list(slot.view(len(words) * NUM_SLOTS, SLOT_BYTES)) for slot in slots]
        # Words of a rank, a line each: what was sent to each rank; what was received from each; which message of each
        # was refused (serial, elements, dtype); and of each slot (tag, bytes, bytes in it, dtype, serial).
        self._received = LINE * len(words)
        self._refused = 2 * LINE * len(words)
        self._headers = 3 * LINE * len(words)
        self._pairs = [_Pair() for _ in words]
        # Those whose message has not begun to come. Whoever gave the last one comes last for the next one.
        self._from_any: dict[int, deque[Message]] = defaultdict(deque)
        self._num_from_any = 0
        self._turns = list(enumerate(self._pairs))
        # The thread that runs operations and the one that posts them may advance at once.
        self._lock = threading.Lock()
        self._num_open = 0
        _mailboxes.add(self)

    def has_open(self) -> bool:
        """Whether messages of this rank are under way."""
        return self._num_open > 0

    def send(self, memory: Tensor, dst: int, tag: int, dtype: torch.dtype = torch.uint8) -> Message:
        """Start to send bytes, which are elements of ``dtype``."""
        message = Message(memory, tag, dtype)
        with self._lock:
            self._pairs[dst].outgoing.append(message)
            self._num_open += 1
        self.advance()
        return message

    def receive(self, memory: Tensor, src: int, tag: int, dtype: torch.dtype = torch.uint8) -> Message:
        """Start to receive bytes, which are elements of ``dtype``; with ANY_SOURCE from whoever sends first."""
        receive = Message(memory, tag, dtype)
        with self._lock:
            if src == ANY_SOURCE:
                self._receive_from_any(receive)
            else:
                self._receive_from(src, self._pairs[src], receive)
        return receive

    def _receive_from(self, src: int, pair: _Pair, receive: Message) -> None:
        self._count_receives(pair, 1)
        if not pair.unexpected[receive.tag]:
            pair.expected[receive.tag].append(receive)
            return
        receive.src = src
        arrival = pair.unexpected[receive.tag].popleft()
        if arrival.kind != receive.kind:
            self._refuse(arrival, receive, pair, src)
        else:
            arrival.receive = receive
            self._finish_if_complete(arrival, pair)

    def _receive_from_any(self, receive: Message) -> None:
        for src, pair in self._turns:
            if pair.unexpected[receive.tag]:
                self._receive_from(src, pair, receive)
                self._serve_last(src)
                return
        self._from_any[receive.tag].append(receive)
        self._num_from_any += 1
        self._num_open += 1

    def _serve_last(self, src: int) -> None:
        """Let all others go before ``src`` where a receive does not name its source."""
        behind = 1 + [peer for peer, _ in self._turns].index(src)
        self._turns = [
            *self._turns[behind:],
            *self._turns[:behind],
        ]  # a new list: advance() may be going through the old

    def advance(self) -> None:
        """Move what can be moved now."""
        if not self._num_open:
            return
        with self._lock:
            for peer, pair in self._turns:
                while pair.outgoing and self._push(peer, pair):
                    pass
                # Not without a receive: a rank that computes would fill its memory with what it may never ask for.
                # So an unexpected message is taken in only on the way to one that is expected.
                while (pair.num_receives or self._num_from_any) and self._pull(peer, pair):
                    pass

    def _push(self, dst: int, pair: _Pair) -> bool:
        """Fill a slot, if one is free; whether anything has changed."""
        own = self._words[self._rank]
        message = pair.outgoing[0]
        if self._was_refused(message, dst, pair):
            self._end_send(pair)
            return True
        sent = own[LINE * dst]
        if sent - self._words[dst][self._received + LINE * self._rank] == NUM_SLOTS:
            return False
        if message.num_moved == 0:
            pair.num_begun += 1
        slot = dst * NUM_SLOTS + sent % NUM_SLOTS
        length = min(message.nbytes - message.num_moved, SLOT_BYTES)
        message.copy_into(self._slots[self._rank][slot], length)
        header = self._headers + LINE * slot
        own[header] = message.tag
        own[header + 1] = message.nbytes
        own[header + 2] = length
        own[header + 3] = DTYPES.index(message.dtype)
        own[header + 4] = pair.num_begun
        # The count comes last: on x86-64 stores are seen in their order, so who sees it sees the slot and its header.
        own[LINE * dst] = sent + 1
        self._ring(dst)
        if message.done:
            self._end_send(pair)
        return True

    def _was_refused(self, message: Message, dst: int, pair: _Pair) -> bool:
        """Whether the receiver does not want the message that has begun to go to it; ends it with that error."""
        theirs = self._words[dst]
        refused = self._refused + LINE * self._rank
        # They still stand there when later messages are sent, so they name the one that they mean. They are overwritten
        # only when it has ended: what is refused in this way is still coming, and one message comes at a time.
        if message.num_moved == 0 or theirs[refused] != pair.num_begun:
            return False
        message.fail(to(dst, *message.kind, theirs[refused + 1], DTYPES[theirs[refused + 2]]))
        return True

    def _end_send(self, pair: _Pair) -> None:
        pair.outgoing.popleft()
        self._num_open -= 1

    def _pull(self, src: int, pair: _Pair) -> bool:
        """Empty a slot, if one is full; whether it was."""
        own = self._words[self._rank]
        theirs = self._words[src]
        count = own[self._received + LINE * src]
        if theirs[LINE * self._rank] == count:
            return False
        slot = self._rank * NUM_SLOTS + count % NUM_SLOTS
        header = self._headers + LINE * slot
        arrival = pair.arriving
        # The serial tells where a message ends of which the sender has dropped the rest.
        if arrival is None or arrival.serial != theirs[header + 4]:
            nbytes = theirs[header + 1]
            dtype = DTYPES[theirs[header + 3]]
            arrival = self._begin(pair, src, theirs[header], theirs[header + 4], (nbytes // dtype.itemsize, dtype))
            pair.arriving = arrival
        if arrival.message is not None:
            arrival.message.copy_from(self._slots[src][slot], theirs[header + 2])
        own[self._received + LINE * src] = count + 1
        # The sender waits for a slot only where all were full, and whether they were is looked at last: had it been
        # looked at before this slot was given back, the sender could have filled the others since, and sleep.
        if theirs[LINE * self._rank] - count == NUM_SLOTS:
            self._ring(src)
        self._finish_if_complete(arrival, pair)
        return True

    def _begin(self, pair: _Pair, src: int, tag: int, serial: int, kind: Kind) -> _Arrival:
        """Find out where the message goes of which the first piece has come."""
        numel, dtype = kind
        receive = self._take_receive(pair, src, tag)
        if receive is None:
            memory = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device="cpu")
            arrival = _Arrival(serial, kind, Message(memory, tag, dtype), None)
            pair.unexpected[tag].append(arrival)
        elif receive.kind == kind:
            arrival = _Arrival(serial, kind, receive, receive)
        else:
            arrival = _Arrival(serial, kind, None, None)
            self._refuse(arrival, receive, pair, src)
        return arrival

    def _take_receive(self, pair: _Pair, src: int, tag: int) -> Message | None:
        """Return the receive of a message that comes, if it is posted; one that names its source goes first."""
        if pair.expected[tag]:
            receive = pair.expected[tag].popleft()
        elif self._from_any[tag]:
            receive = self._from_any[tag].popleft()
            self._num_from_any -= 1
            self._num_open -= 1
            self._count_receives(pair, 1)
            self._serve_last(src)
        else:
            return None
        receive.src = src
        return receive

    def _refuse(self, arrival: _Arrival, receive: Message, pair: _Pair, src: int) -> None:
        """End a receive that names another kind of message, and tell the sender, which may still hold some of it."""
        if not arrival.is_complete:
            own = self._words[self._rank]
            refused = self._refused + LINE * src
            numel, dtype = receive.kind
            own[refused + 1] = numel
            own[refused + 2] = DTYPES.index(dtype)
            own[refused] = arrival.serial  # last: the sender that sees its message's number reads the other two
            self._ring(src)
        arrival.message = None
        receive.fail(received(src, *arrival.kind, *receive.kind))
        self._count_receives(pair, -1)

    def _finish_if_complete(self, arrival: _Arrival, pair: _Pair) -> None:
        if not arrival.is_complete:
            return
        if arrival is pair.arriving:
            pair.arriving = None  # so that nothing here keeps the memory of a receive that is done
        if arrival.receive is not None:
            arrival.hand_over()
            self._count_receives(pair, -1)

    def _count_receives(self, pair: _Pair, change: int) -> None:
        pair.num_receives += change
        self._num_open += change
