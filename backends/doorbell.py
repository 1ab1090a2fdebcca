"""Waiting for other processes on words of shared memory: spin briefly, then sleep in the kernel.

Whoever changes a word that another rank may wait for rings that rank's bell afterwards, which costs a look at
shared memory where it is not asleep. The kernel's futex (Franke, Russell and Kirkwood, "Fuss, futexes and
furwocks", 2002) closes the gap between looking and falling asleep: it refuses to sleep on a bell that has been
rung since. A sleeper wakes by itself now and then, to see whether it still has anything to wait for.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import threading
import time
from collections.abc import Callable, Sequence

from backends import cores
from minidist.errors import BackendUnavailableError

SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1  # Linux on x86-64
EVERYBODY = 2**31 - 1
NAP_S = 0.02
"""The longest sleep; also what a ring costs that the memory system delivers too late to be seen."""
_syscall = ctypes.CDLL(None, use_errno=True).syscall


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_NAP = ctypes.byref(_Timespec(0, int(NAP_S * 1e9)))


def check_available() -> None:
    """Raise BackendUnavailableError where processes cannot wait like this."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise BackendUnavailableError(
            f"shm needs Linux on x86-64, whose stores other cores see in order, and this is {platform.system()} on "
            f"{platform.machine()}; use comm=gloo"
        )


class Doorbell:
    """The bells of all ranks, as one rank uses them.

    Args:
        rank: the rank of this process.
        bells: per rank two words of shared memory: its bell, and how many of its threads sleep.
        addresses: of the bells, in this process.
        spin: whether every rank has a core to spin on.
    """

    def __init__(self, rank: int, bells: Sequence[memoryview], addresses: Sequence[int], spin: bool) -> None:
        self._own, self._address = bells[rank], addresses[rank]
        self._bells, self._addresses = bells, addresses
        self._others = [peer for peer in range(len(bells)) if peer != rank]
        self._spin_s = cores.SPIN_S if spin else 0.0
        # No two rings write the same value, so that every ring changes the bell, whoever else rings.
        self._values = itertools.count(rank, len(bells))
        self._num_sleepers, self._lock = 0, threading.Lock()

    def ring(self, peer: int) -> None:
        """Wake ``peer`` if it sleeps; call it after each change that it may wait for."""
        bell = self._bells[peer]
        if bell[1]:
            bell[0] = next(self._values)
            _syscall(SYS_FUTEX, ctypes.c_void_p(self._addresses[peer]), FUTEX_WAKE, EVERYBODY, None, None, 0)

    def ring_all(self) -> None:
        """Wake all others that sleep."""
        for peer in self._others:
            self.ring(peer)

    def wait(self, ready: Callable[[], bool], hopeless: Callable[[], Exception | None]) -> None:
        """Return once ``ready()``; raise what ``hopeless()`` returns, which is asked before each sleep."""
        spin_until = time.perf_counter() + self._spin_s
        while time.perf_counter() < spin_until:
            if ready():
                return
        while not self._ready_after_sleep(ready, hopeless):
            pass

    def _ready_after_sleep(self, ready: Callable[[], bool], hopeless: Callable[[], Exception | None]) -> bool:
        seen = self._own[0]
        self._count_sleepers(1)
        try:
            error = hopeless()
            if ready():  # after the question: a rank that is gone may have done before what is waited for
                return True
            if error is not None:
                raise error
            _syscall(SYS_FUTEX, ctypes.c_void_p(self._address), FUTEX_WAIT, seen & 0xFFFFFFFF, _NAP, None, 0)
        finally:
            self._count_sleepers(-1)
        return ready()

    def _count_sleepers(self, change: int) -> None:
        with self._lock:
            self._num_sleepers += change
            self._own[1] = self._num_sleepers
