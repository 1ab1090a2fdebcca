"""What MPI ranks tell each other about those who left or failed, which MPI itself keeps to itself.

Notices travel on one duplicate of COMM_WORLD that lives as long as MPI, and name their communicator by a key
that is never used twice: MPI reuses the identity of a freed communicator, and with it what was still on its way.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.contact import LEFT
from minidist.contract.rank import ANY_SOURCE


class Notices:
    """The notices of a process, for all of its communicators. Thread-safe.

    Args:
        MPI: mpi4py's module, initialised; every process of the world makes this once.

    Attributes:
        num_told: how many notices this process has sent to each one.
    """

    def __init__(self, MPI: Any) -> None:
        self._any_source = MPI.ANY_SOURCE
        self._status = MPI.Status()
        self._comm = MPI.COMM_WORLD.Dup()
        self.num_told = np.zeros(self._comm.size, np.int64)
        self._num_heard = np.zeros(self._comm.size, np.int64)
        self._lock = threading.Lock()
        self._news: dict[str, _News] = {}
        self._sending: list[Any] = []

    def watch(self, key: str) -> None:
        """Keep what is told of ``key`` from now on; all of its ranks do so before one of them can leave or fail."""
        with self._lock:
            self._news[key] = _News()

    def tell(self, key: str, rank: int, why: str | None, world_ranks: list[int]) -> None:
        """Tell ``world_ranks`` that ``rank`` of the communicator ``key`` failed, or left (``why`` None)."""
        me = self._comm.rank
        with self._lock:
            # Nobody waits for these: the other rank may never look again. They are kept until MPI is done with their
            # memory, which it says to who asks.
            self._sending = [request for request in self._sending if not request.test()[0]]
            others = [other for other in world_ranks if other != me]
            self._sending += [self._comm.isend((key, rank, why), other) for other in others]
            self.num_told[others] += 1

    def failed(self, key: str) -> dict[int, str]:
        """Return the ranks that are known to have failed and why, the first one first."""
        with self._lock:  # without hearing what is new: every operation asks this, and MPI is not cheap to ask
            news = self._news.get(key)
            return {} if news is None else {rank: why for rank, why in news.gone.items() if why}

    def needed(self, key: str, peer: int | None, num_others: int, grace_s: float) -> tuple[int, str] | None:
        """Return a rank without which an operation cannot end: one that failed, or that left and is needed.

        Args:
            key: whose operation it is.
            peer: the one rank that it needs; ANY_SOURCE for any other rank; None for all of them.
            num_others: how many other ranks there are.
            grace_s: how long an operation may go on after news: it may have got all that it needs.
        """
        with self._lock:
            self._hear()
            news = self._news.get(key)
            # Any news starts the grace again: a farewell is often followed by the failure that was the cause of it.
            if news is None or time.monotonic() < news.heard_at + grace_s:
                return None
            needs_all = peer is None or (peer == ANY_SOURCE and len(news.gone) == num_others)
            needed = ((rank, why or LEFT) for rank, why in news.gone.items() if why or needs_all or rank == peer)
            return next(needed, None)

    def forget(self, key: str) -> None:
        """Drop what is known of a communicator that is closed, and what is still told of it."""
        with self._lock:
            self._news.pop(key, None)

    def hear_the_rest(self, num_told: Any, timeout_s: float) -> None:
        """Hear what is still on its way: a message that nobody receives is a warning of MPI's at its end.

        Args:
            num_told: by each process to this one.
            timeout_s: for all of it to come.
        """
        give_up = time.monotonic() + timeout_s
        while (self._num_heard < num_told).any() and time.monotonic() < give_up:
            with self._lock:
                self._hear()

    def _hear(self) -> None:
        while (message := self._comm.improbe(self._any_source, status=self._status)) is not None:
            self._num_heard[self._status.Get_source()] += 1
            key, rank, why = message.recv()
            # What is told of a communicator that is closed here concerns nobody any more.
            if (news := self._news.get(key)) is not None:
                # A failure stays one when its rank also leaves; a rank that left can turn out to have been needed.
                news.gone[rank] = news.gone.get(rank) or why
                news.heard_at = time.monotonic()


@dataclass
class _News:
    """What is known of a communicator: who is gone and why, in the order of the news, and when the last one came."""

    gone: dict[int, str | None] = field(default_factory=dict)
    heard_at: float = -math.inf
