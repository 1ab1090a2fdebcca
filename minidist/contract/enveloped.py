"""An envelope and its pieces on their way, and which pieces are posted only when envelopes have come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from torch import Tensor

from minidist.contract.work import Work


class Enveloped(Work):
    """A message in an envelope and pieces; see `minidist.contract.envelope`.

    Args:
        first, envelope: the envelope on its way, and its memory.
        rest: the pieces on their way.
        unpack: called when the envelope of a receive has come; where the pieces are late, it posts them.
        late: where the receive waits for that, if they are.
    """

    def __init__(
        self,
        first: Work,
        envelope: Tensor,
        rest: list[Work],
        unpack: Callable[[], None] | None = None,
        late: Late | None = None,
    ) -> None:
        self._first = first
        self._envelope = envelope
        self._rest = rest
        self._unpack = unpack
        self._late = late
        self.is_open = False
        self._error: Exception | None = None
        if late is not None:
            late.add(self)

    def wait(self) -> None:
        self._open()
        for work in self._rest:
            work.wait()

    def _open(self) -> None:
        """Wait for the envelope, and look what is in it."""
        if self._error is not None:
            raise self._error
        if self.is_open:
            return
        try:
            self._first.wait()
            if self._late is None:
                self.look()
            else:
                self._late.open(self)
        except Exception as error:
            self._error = error
            raise

    def look(self) -> None:
        """Wait for the envelope, and look what is in it, whatever is before it."""
        self._first.wait()
        self.peer = self._first.peer
        if self._unpack is not None:
            self._unpack()
        self.is_open = True

    def is_done(self) -> bool:
        if not self.is_open and self._error is None:
            if not self._first.is_done():
                return False
            try:
                self._open()
            except Exception:  # kept for who waits
                return True
        return self._error is not None or all(work.is_done() for work in self._rest)

    def exception(self) -> BaseException | None:
        found = (work.exception() for work in (self._first, *self._rest))
        return self._error or next((error for error in found if error is not None), None)


class Late:
    """The receives of one tag whose pieces are not posted yet, in the order in which they were posted themselves."""

    def __init__(self) -> None:
        self._receives: deque[Enveloped] = deque()
        self._lock = threading.Lock()  # each may have a thread that waits for it

    @property
    def is_empty(self) -> bool:
        """Whether no receive waits."""
        return not self._receives

    def add(self, receive: Enveloped) -> None:
        """Let a receive wait behind the others."""
        self._receives.append(receive)

    def open(self, receive: Enveloped) -> None:
        """Open those up to ``receive``, whose envelope has come: then those before it have, which would have taken it.

        The first that is wrong makes all behind it fail, since its pieces, which nobody receives, would become theirs.
        """
        with self._lock:
            while not receive.is_open:
                self._receives[0].look()
                self._receives.popleft()
