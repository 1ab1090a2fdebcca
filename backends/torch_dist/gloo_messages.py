"""Messages over Gloo, which says of them neither whether they have ended nor lets go of who waits for them."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor

from backends.contact import ContactLostError
from backends.deadline import Deadline
from minidist.communicator import Work
from minidist.contract.library_wait import waits_in_library
from minidist.errors import CommError

LEFT_S = 0.5
"""How long a message may go on after its receiver has left."""


class Owner(Protocol):
    """What a message has to know of its communicator."""

    waited_for: WeakSet[GlooMessage]
    tag_bits: int

    @property
    def max_tag(self) -> int: ...

    @property
    def left(self) -> set[int]: ...

    def wait_for(self, work: Any, timeout_s: float, peer: int | None = None) -> None: ...


class GlooMessage(Work):
    """A send or receive.

    Nothing tells from outside whether Gloo has ended it, and nothing interrupts one who waits. So a thread waits for a
    user's message, which can be left behind; those of schedules are waited for in one that can.
    """

    def __init__(self, comm: Owner, work: Any, tensor: Tensor, peer: int, tag: int, timeout_s: float) -> None:
        self._comm = comm
        self._work = work
        self._tensor = tensor
        self._peer = peer
        self._in_schedule = tag % 2**comm.tag_bits == comm.max_tag + 2
        self._deadline = Deadline(timeout_s)
        self._done = False
        self._ended: Future[None] | None = None

    def wait(self) -> None:
        if self._in_schedule and self._ended is None:
            if not self._done:
                self._finish()
        else:
            self._awaited().result()

    def give_up(self, error: Exception) -> None:
        """Let whoever waits for it have ``error``."""
        with contextlib.suppress(InvalidStateError):  # it has ended by itself
            self._awaited().set_exception(error)

    def _finish(self) -> None:
        try:
            # In a schedule the peer may itself wait for the rank that did not come.
            self._comm.wait_for(self._work, self._deadline.left_s, None if self._in_schedule else self._peer)
        except CommError:
            raise
        except RuntimeError as error:
            raise ContactLostError(self._peer) from error
        self._done = True

    def _awaited(self) -> Future[None]:
        """Return its end, for which a thread waits from the first call on."""
        if self._ended is None:
            self._ended = Future()
            self._comm.waited_for.add(self)
            waits_in_library(threading.Thread(target=self._await, args=(self._ended,), daemon=True)).start()
        return self._ended

    def _await(self, ended: Future[None]) -> None:
        error: BaseException | None = None
        try:
            self._finish()
        except BaseException as caught:  # whatever it is belongs to the one who waits
            error = caught
        with contextlib.suppress(InvalidStateError):  # it was given up
            ended.set_result(None) if error is None else ended.set_exception(error)

    def is_done(self) -> bool:
        return self._done or self._awaited().done()

    def exception(self) -> BaseException | None:
        return self._ended.exception() if self._ended is not None and self._ended.done() else None


class GlooSend(GlooMessage):
    """Gloo lets a sender wait for a receiver that has left; who polls is told so by the lifeline."""

    _hopeless_from: float | None = None

    def is_done(self) -> bool:
        return super().is_done() or self._is_hopeless()

    def exception(self) -> BaseException | None:
        return ContactLostError(self._peer) if self._is_hopeless() else super().exception()

    def _is_hopeless(self) -> bool:
        """Whether the receiver left some time ago and this has not ended: the news may overtake the end of it."""
        if self._done or self._peer not in self._comm.left or (self._ended is not None and self._ended.done()):
            return False
        if self._hopeless_from is None:
            self._hopeless_from = time.monotonic() + LEFT_S
        return time.monotonic() > self._hopeless_from
