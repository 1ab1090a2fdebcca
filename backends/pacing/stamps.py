"""When each message arrives, told to its receiver beside the message.

For each two ranks there is a ring of *stamps*, which one of them writes and the other one reads, in the order in which
messages were sent. A stamp is written before its message leaves, so that whoever has the message finds it. Messages of
one tag come in that order too, so that the first stamp of a tag is that of the first message::

    rank 0 to 1     tag 5, at 12.70 | tag 0, at 12.71 | tag 5, at 12.74 |
                    taken                               sent
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from backends.pacing.page import Page
from minidist.communicator import Communicator
from minidist.errors import CommError

NUM_STAMPS = 4096
"""How many messages from one rank to another one may be on their way."""


class Stamps:
    """The stamps of a communicator, whose ranks are on one host; all ranks make it.

    One word written is seen whole and in order by others, as on x86-64; see `backends.shm.arena`.

    Args:
        comm: of the ranks.
    """

    def __init__(self, comm: Communicator) -> None:
        self._rank = comm.rank
        pairs = (comm.world_size, comm.world_size)
        shapes = (pairs, pairs, (*pairs, NUM_STAMPS), (*pairs, NUM_STAMPS))
        sizes = [int(np.prod(shape)) for shape in shapes]
        self._page = Page(comm, sum(sizes))
        parts = np.split(self._page.words, np.cumsum(sizes)[:-1])
        self._sent, self._taken, self._tags, times = (
            part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
        )
        self._times = times.view(np.float64)
        self._seen: dict[int, list[tuple[int, float]]] = defaultdict(list)  # by source, what was read too early
        self._lock = threading.Lock()  # messages can be sent, and waited for, beside a collective

    def put(self, dst: int, tag: int, at: float) -> None:
        """Say that the next message to ``dst`` with this tag arrives then.

        Raises:
            CommError: NUM_STAMPS messages to it are on their way.
        """
        pair = self._rank, dst
        with self._lock:
            number = self._sent[pair]
            if number - self._taken[pair] >= NUM_STAMPS:
                raise CommError(
                    f"{NUM_STAMPS} messages to rank {dst} are on their way, for which it has not waited yet; "
                    "let it wait for some of them before sending more"
                )
            self._tags[pair][number % NUM_STAMPS] = tag
            self._times[pair][number % NUM_STAMPS] = at
            self._sent[pair] = number + 1

    def take(self, src: int, tag: int) -> float | None:
        """Return when the next message from ``src`` with this tag arrives, if there is one; each is asked for once."""
        pair = src, self._rank
        with self._lock:
            seen = self._seen[src]
            for number in range(self._taken[pair], self._sent[pair]):
                place = number % NUM_STAMPS
                seen.append((int(self._tags[pair][place]), float(self._times[pair][place])))
                self._taken[pair] = number + 1
            found = _index(tag, seen)
            return None if found is None else seen.pop(found)[1]


def _index(tag: int, seen: Iterable[tuple[int, float]]) -> int | None:
    return next((index for index, stamp in enumerate(seen) if stamp[0] == tag), None)
