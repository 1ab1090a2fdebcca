"""Messages that a rank has sent and not waited for: their memory is still read, and somebody may yet receive them."""

from __future__ import annotations

import time
from typing import Protocol

CLOSE_S = 30.0
"""How long a rank that closes waits for messages of its own that nobody has received."""
POLL_S = 1e-3
MANY = 64
"""From here on it pays to look which of them are done."""
MAX_NAMED = 5


class Send(Protocol):
    """A message on its way; ``str()`` says what it is."""

    def is_done(self) -> bool:
        """Return whether it has ended, well or not."""
        ...

    def failure(self) -> Exception | None:
        """Return why one that has ended was not received, and leave the communicator as it is."""
        ...


class OpenSends:
    """The sends of one communicator that are not known to be finished."""

    def __init__(self) -> None:
        self._sends: dict[Send, None] = {}  # in their order

    def add(self, send: Send) -> None:
        """Keep a send until somebody has waited for it, or it is found done."""
        if len(self._sends) >= MANY:
            self._sends = {send: None for send in self._sends if not send.is_done()}
        self._sends[send] = None

    def remove(self, send: Send) -> None:
        """Forget a send that has ended."""
        self._sends.pop(send, None)

    def finish(self, timeout_s: float) -> str | None:
        """Wait for all of them, 30 s at most, and forget them; return which ones nobody has received, if any."""
        sends = list(self._sends)
        seconds = min(CLOSE_S, timeout_s)
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and not all(send.is_done() for send in sends):
            time.sleep(POLL_S)
        lost = [send for send in sends if not send.is_done() or send.failure() is not None]
        self._sends.clear()
        if not lost:
            return None
        others = f"; and {len(lost) - MAX_NAMED} others" if len(lost) > MAX_NAMED else ""
        return f"not received within {seconds:g} s: {'; '.join(map(str, lost[:MAX_NAMED]))}{others}"
