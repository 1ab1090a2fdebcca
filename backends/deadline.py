"""Until when a rank waits for others."""

from __future__ import annotations

import time

from minidist.contract.rank import ANY_SOURCE
from minidist.errors import CommTimeoutError

LEAST_S = 1e-3
"""What is given to a transport when no time is left: it takes no 0, and a short look may still find what has come."""


class Deadline:
    """The end of a wait that begins now.

    Attributes:
        timeout_s: how long all of the wait may take.
    """

    __slots__ = ("_at", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """How many seconds are left, LEAST_S if none."""
        return max(self._at - time.monotonic(), LEAST_S)

    def missed_by(self, peer: int | None) -> CommTimeoutError | None:
        """Return what to tell the caller about ``peer``, once no time is left; see `timed_out`."""
        return timed_out(self.timeout_s, peer) if time.monotonic() > self._at else None


def timed_out(timeout_s: float, peer: int | None = None) -> CommTimeoutError:
    """Return what to tell who has waited for ``peer``, with ANY_SOURCE for any other rank, with None for all ranks."""
    within = f"within the timeout of {timeout_s:.3g} s"
    if peer is None:
        return CommTimeoutError(f"no answer {within}; a rank did not take part")
    if peer == ANY_SOURCE:
        return CommTimeoutError(f"no message from any rank {within}; no rank has sent one with this tag")
    return CommTimeoutError(f"no answer from rank {peer} {within}; it did not take part")
