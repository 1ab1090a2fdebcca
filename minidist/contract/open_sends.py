"""Messages that a rank has sent and not waited for: their memory is still read, and somebody may yet receive them."""

from __future__ import annotations

import time

from minidist.contract.work import Work

CLOSE_S = 30.0
"""How long a rank that closes waits for messages of its own that nobody has received."""
POLL_S = 1e-3
MANY = 64
"""From here on it pays to look which of them are done."""
MAX_NAMED = 5


class OpenSends:
    """The sends of one communicator that are not known to be finished. A send says in ``str()`` what it is."""

    def __init__(self) -> None:
        self._sends: dict[Work, None] = {}  # in their order

    def add(self, send: Work) -> None:
        """Keep a send until somebody has waited for it, or it is found done."""
        if len(self._sends) >= MANY:
            self._sends = {send: None for send in self._sends if not send.is_done()}
        self._sends[send] = None

    def remove(self, send: Work) -> None:
        """Forget a send that has ended."""
        self._sends.pop(send, None)

    def finish(self, timeout_s: float) -> str | None:
        """Wait for all of them, 30 s at most, and forget them; return which ones nobody has received, if any."""
        sends = list(self._sends)
        seconds = min(CLOSE_S, timeout_s)
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and not all(send.is_done() for send in sends):
            time.sleep(POLL_S)
        lost = [send for send in sends if not send.is_done() or send.exception() is not None]
        self._sends.clear()
        if not lost:
            return None
        others = f"; and {len(lost) - MAX_NAMED} others" if len(lost) > MAX_NAMED else ""
        return f"not received within {seconds:g} s: {'; '.join(map(str, lost[:MAX_NAMED]))}{others}"
