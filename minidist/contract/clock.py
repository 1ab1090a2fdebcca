"""What time it is for a rank: that of the machine, unless a communicator has another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """The time in which operations and training are measured; this one is the machine's, and has no state."""

    # No method, so that what is measured on the way of every gradient enters no function more.
    now_s: Callable[[], float] = staticmethod(time.perf_counter)
    """Returns the seconds since some moment in the past, never less than before; differences mean something."""

    def step_done(self) -> None:
        """Take note that this rank has computed a step of training. A clock may go by steps; this one does not."""
        return

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Take note that what starts inside is no part of a step, where a clock goes by steps."""
        yield
