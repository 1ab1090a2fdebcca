"""Waiting for other processes on words of shared memory: spin briefly, then sleep in the kernel.

Whoever changes a word that another rank may wait for rings that rank's bell afterwards, which costs a look at
shared memory where it is not asleep. The kernel's futex (Franke, Russell and Kirkwood, "Fuss, futexes and
furwocks", 2002) closes the gap between looking and falling asleep: it refuses to sleep on a bell that has been
rung since it was read::

    who waits                              who changes a word
    1  read the own bell                   a  change the word
    2  say "asleep"                        b  if the other says "asleep": change its bell, wake it
    3  look at the word, go if it is there
    4  sleep, unless the bell differs from 1

Either 3 sees the change a, or a came after 3, and so b after 2: then b finds the sleeper and changes the bell, which 4
notices or is woken by. One gap is left: a core may look (b) before its own store (a) is seen by others, and then
neither side sees the other. It lasts as long as a store takes to leave the core, and costs a nap (`NAP_S`), as a
sleeper wakes by itself now and then anyway, to see whether it still has anything to wait for.

Every communicator has bells of its own, and a rank that waits on one moves the messages of all. So it sleeps on its
bells of those that have messages under way too (futex_waitv, Linux 5.16); an older kernel lets it nap.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import platform
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from backends import cores
from minidist.contract.forks import Living
from minidist.errors import BackendUnavailableError

# Linux on x86-64
SYS_FUTEX = 202
FUTEX_WAIT = 0
FUTEX_WAKE = 1
SYS_FUTEX_WAITV = 449
FUTEX_U32 = 2
MAX_BELLS = 128
EVERYBODY = 2**31 - 1
NAP_S = 0.02
"""The longest sleep; also what a ring costs that the memory system delivers too late to be seen. That did not happen in
50 000 sleeps of 3 ranks on 2 busy cores, so a fence before each sleep, of up to 9 us, would cost more than it gains."""
_syscall = ctypes.CDLL(None, use_errno=True).syscall


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Waiter(ctypes.Structure):
    _fields_ = (("value", ctypes.c_uint64), ("address", ctypes.c_uint64), ("flags", ctypes.c_uint64))


def _timespec(seconds: float) -> Any:
    return ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))


def _nothing_under_way() -> bool:
    return False


def ensure_futex() -> None:
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

    Attributes:
        expects_mail: whether messages are under way that this rank moves, whatever it is that it waits for.
    """

    def __init__(self, rank: int, bells: Sequence[memoryview], addresses: Sequence[int]) -> None:
        self._own = bells[rank]
        self._address = addresses[rank]
        self._bells = bells
        self._addresses = addresses
        self._others = [peer for peer in range(len(bells)) if peer != rank]
        # No two rings write the same value, so that every ring changes the bell, whoever else rings; the odd ones are
        # those of compiled kernels.
        self._values = itertools.count(2 * rank, 2 * len(bells))
        # Two threads of this rank may sleep at once, and the one that wakes must not say that nobody does.
        self._num_sleepers = 0
        self._lock = threading.Lock()
        self._nap = _timespec(NAP_S)
        self.expects_mail: Callable[[], bool] = _nothing_under_way
        _doorbells.add(self)

    def ring(self, peer: int) -> None:
        """Wake ``peer`` if it sleeps; call it after each change that it may wait for."""
        bell = self._bells[peer]
        if bell[1]:
            bell[0] = next(self._values)
            _syscall(SYS_FUTEX, ctypes.c_void_p(self._addresses[peer]), FUTEX_WAKE, EVERYBODY, None, None, 0)

    def forget_mail(self) -> None:
        """Let go of the messages, which hold this bell in turn, and all of their memory."""
        self.expects_mail = _nothing_under_way

    def ring_all(self) -> None:
        """Wake all others that sleep."""
        for peer in self._others:
            self.ring(peer)

    def wait(self, ready: Callable[[], bool], before_sleep: Callable[[], Exception | None], spins: bool) -> None:
        """Return once ``ready()``; raise what ``before_sleep()`` returns, which is called before each sleep.

        ``spins`` only with a core to itself: who spins on a shared core keeps the one from it that it waits for.
        """
        spin_until = time.perf_counter() + cores.SPIN_S * spins
        while time.perf_counter() < spin_until:
            if ready():
                return
        while not self._ready_after_sleep(ready, before_sleep):
            pass

    def _ready_after_sleep(self, ready: Callable[[], bool], before_sleep: Callable[[], Exception | None]) -> bool:
        bells = [self, *(bell for bell in _doorbells.all() if bell.expects_mail() and bell is not self)]
        seen = [bell._own[0] & 0xFFFFFFFF for bell in bells]
        for bell in bells:
            bell._count_sleepers(1)
        # From here on it counts as asleep. What is looked at below is looked at after that, so that whoever changes it
        # later rings; before_sleep() moves messages, too, so their slots are looked at here.
        try:
            error = before_sleep()
            if ready():  # after the question: a rank that is gone may have done before what is waited for
                return True
            if error is not None:
                raise error
            # The kernel compares with what was seen at the beginning: a ring since then ends the sleep at once.
            if len(bells) == 1 or not _sleep_on_all(bells[:MAX_BELLS], seen):
                _syscall(SYS_FUTEX, ctypes.c_void_p(self._address), FUTEX_WAIT, seen[0], self._nap, None, 0)
        finally:
            for bell in bells:
                bell._count_sleepers(-1)
        return ready()

    def _count_sleepers(self, change: int) -> None:
        with self._lock:
            self._num_sleepers += change
            self._own[1] = self._num_sleepers


def _sleep_on_all(bells: Sequence[Doorbell], seen: Sequence[int]) -> bool:
    """Sleep until one of the bells is rung, or has been since it was seen; whether the kernel can do that."""
    waiters = (_Waiter * len(bells))()
    for waiter, bell, value in zip(waiters, bells, seen, strict=False):
        waiter.value = value
        waiter.address = bell._address
        waiter.flags = FUTEX_U32
    until = _timespec(time.monotonic() + NAP_S)
    woken = _syscall(SYS_FUTEX_WAITV, waiters, len(bells), 0, until, time.CLOCK_MONOTONIC)
    return woken >= 0 or ctypes.get_errno() in (errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)


_doorbells: Living[Doorbell] = Living()
"""All bells of this process, as `backends.shm.mailbox` has its mailboxes."""
