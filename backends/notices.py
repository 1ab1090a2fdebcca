"""What MPI ranks tell each other about those who left or failed, which MPI itself keeps to itself.

Notices travel on one duplicate of COMM_WORLD that lives as long as MPI, and name their communicator by a key
that is never used twice: MPI reuses the identity of a freed communicator, and with it what was still on its way.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Any

from backends.contact import LEFT


class Notices:
    """The notices of a process, for all of its communicators. Thread-safe.

    Args:
        MPI: mpi4py's module, initialised; every process of the world makes this once.
    """

    def __init__(self, MPI: Any) -> None:
        self._any_source = MPI.ANY_SOURCE
        self._comm = MPI.COMM_WORLD.Dup()
        self._lock = threading.Lock()
        self._gone: dict[str, dict[int, str | None]] = defaultdict(dict)
        self._heard_at: dict[str, float] = {}
        self._sending: list[Any] = []

    def tell(self, key: str, rank: int, why: str | None, world_ranks: list[int]) -> None:
        """Tell ``world_ranks`` that ``rank`` of the communicator ``key`` failed, or left (``why`` None)."""
        me = self._comm.rank
        with self._lock:
            self._sending = [request for request in self._sending if not request.test()[0]]
            self._sending += [self._comm.isend((key, rank, why), other) for other in world_ranks if other != me]

    def failed(self, key: str) -> dict[int, str]:
        """Return the ranks that are known to have failed and why, the first one first."""
        return {rank: why for rank, why in self._gone.get(key, {}).items() if why}

    def needed(self, key: str, peer: int | None, grace_s: float) -> tuple[int, str] | None:
        """Return a rank without which an operation cannot end: one that failed, or that left and is needed.

        Args:
            key: whose operation it is.
            peer: the one rank that it needs; None for all of them.
            grace_s: how long an operation may go on after news: it may have got all that it needs.
        """
        self._hear()
        gone = self._gone.get(key)
        if not gone or time.monotonic() < self._heard_at[key] + grace_s:
            return None
        for rank, why in gone.items():
            if why or peer in (None, rank):
                return rank, why or LEFT
        return None

    def forget(self, key: str) -> None:
        """Drop what is known of a communicator that is closed."""
        self._gone.pop(key, None)

    def _hear(self) -> None:
        with self._lock:
            while (message := self._comm.improbe(self._any_source)) is not None:
                key, rank, why = message.recv()
                self._gone[key][rank] = self._gone[key].get(rank) or why
                self._heard_at[key] = time.monotonic()
