"""Who may compute: a few ranks at a time, so that each computes undisturbed and all of them share one set of caches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GLANCE_S = 0.25
"""After how long who waits looks whether those who have a turn compute at all."""
IDLE_SHARE = 0.1
"""Who computes less of the time than this waits: one that asks every few milliseconds whether a file is there, too."""
LONGEST_S = 60.0
"""How long a turn lasts at most while others wait: one who asks without a pause looks like one who computes."""


class _Holder:
    """A thread that has a turn, and how long it had computed when somebody last looked."""

    def __init__(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._seen = self._look()
        self._until = time.monotonic() + LONGEST_S

    def is_over(self) -> bool:
        """Whether it has not computed for a while, since it waits for something, or has ended; or computes for long."""
        seen, seen_at = self._seen
        now = time.monotonic()
        if now < seen_at + GLANCE_S:
            return False
        self._seen = self._look()
        return now > self._until or self._seen[0] - seen < IDLE_SHARE * (now - seen_at)

    def _look(self) -> tuple[float, float]:
        try:
            return time.clock_gettime(self._clock), time.monotonic()
        except OSError:  # the thread has ended
            return 0.0, time.monotonic()


class Turns:
    """Lets so many threads compute at once; a turn ends where its thread waits for others.

    A turn is for speed and for a measure of what computing takes; nothing is wrong without. So a thread that waits for
    something that nobody here knows of loses its turn, as does one that has it for very long, and no two threads can
    block each other by it.

    Args:
        num_at_once: how many.
    """

    def __init__(self, num_at_once: int) -> None:
        self._free = num_at_once
        self._changed = threading.Condition()
        self._holders: dict[int, _Holder] = {}
        self._num_waiting = 0

    def take(self) -> None:
        """Wait for a turn of this thread."""
        me = threading.get_ident()
        with self._changed:
            self._num_waiting += 1
            try:
                while not self._free:
                    if not self._changed.wait(GLANCE_S):
                        self._end_those_over()
            finally:
                self._num_waiting -= 1
            self._free -= 1
            self._holders[me] = _Holder()

    def end(self) -> bool:
        """End the turn of this thread; return whether it had one."""
        return self._end(threading.get_ident())

    def pass_on(self) -> None:
        """Let one who waits for a turn go first.

        For who only asks, again and again, whether something is done: it computes, so it would keep its turn, and what
        it waits for would never be done.
        """
        with self._changed:
            if not self._num_waiting or not self.end():
                return
            self._changed.wait(GLANCE_S)  # behind those who wait
        self.take()

    @contextmanager
    def let_go(self) -> Iterator[None]:
        """Let others compute while this thread waits for them; it has its turn again afterwards, if it had one."""
        had_one = self.end()
        try:
            yield
        finally:
            if had_one:
                self.take()

    def _end(self, thread: int) -> bool:
        with self._changed:
            if self._holders.pop(thread, None) is None:
                return False
            self._free += 1
            self._changed.notify()  # one: the one that has waited longest
            return True

    def _end_those_over(self) -> None:
        for thread in [thread for thread, holder in self._holders.items() if holder.is_over()]:
            self._end(thread)
