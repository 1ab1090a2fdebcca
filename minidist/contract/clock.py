"""What time it is for a rank: that of the machine, unless a communicator has another one."""

from __future__ import annotations

import time


class Clock:
    """The time in which operations and training are measured; this one is the machine's, and has no state."""

    def now_s(self) -> float:
        """Return the seconds since some moment in the past, never less than before; differences mean something."""
        return time.perf_counter()

    def step_done(self) -> None:
        """Take note that this rank has computed a step of training. A clock may go by steps; this one does not."""
        return
