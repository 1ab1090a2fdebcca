"""Measures what ranks do together, within a time that all of them know alike."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch

from backends.calibration import FLOOR_S
from minidist.communicator import Communicator, ReduceOp

Action = Callable[[], object]
LIMIT_S = 0.06
"""How long one thing is measured at one size, where it is short."""
LEAST = 3
"""How often it is run at the least: once to line the ranks up, and the others count."""
MOST = 40
"""How often at the most."""
SHARE = 20
"""Of what is left of the time, one thing takes no more than so small a part, where it can be run less often."""


class Clock:
    """Seconds that all ranks know alike, and what is left of a budget.

    Args:
        comm: of all ranks, which make it together and measure the same things.
        budget_s: in seconds, from now on.

    Attributes:
        spent_s: how long it took until the last measurement, on the slowest rank.
    """

    def __init__(self, comm: Communicator, budget_s: float = math.inf) -> None:
        self._comm = comm
        self._budget_s = budget_s
        self._began = time.monotonic()
        self.spent_s = 0.0
        self._known: dict[str, dict[int, float]] = {}

    def within(self, budget_s: float) -> Clock:
        """Return this clock with another budget, which began when this one's did."""
        other = copy.copy(self)
        other._budget_s = min(budget_s, self._budget_s)
        return other

    def seconds(self, name: str, nbytes: int, prepare: Callable[[], Action], limit_s: float = LIMIT_S) -> float | None:
        """Return the median seconds of an action on the slowest rank; None where it is not expected to fit.

        The first two sizes are measured in any case.

        Args:
            name: of what is measured; what it took at a smaller size says what it will take.
            nbytes: the size.
            prepare: returns what every rank does; not called where it does not fit.
            limit_s: how long it is repeated, if it is that short.
        """
        known = self._known.setdefault(name, {})
        if known:
            largest = max(known)
            expected = known[largest] * max(nbytes / largest, 1.0)
            if len(known) >= 2 and self.spent_s + LEAST * expected > self._budget_s:
                return None
            action = prepare()
        else:
            action = prepare()
            expected = self.median(action, LEAST)
        limit_s = min(limit_s, (self._budget_s - self.spent_s) / SHARE)
        seconds = self.median(action, max(LEAST, min(MOST, int(limit_s / expected))))
        known[nbytes] = seconds
        return seconds

    def median(self, action: Action, repeats: int) -> float:
        """Return the median seconds of an action on the slowest rank, without the first of at least two runs."""
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - started)
        # The first one lines the ranks up, and prepares what is kept. All have to go on alike, so the slowest counts.
        ours = [statistics.median(seconds[1:]), time.monotonic() - self._began]
        everyones = torch.tensor(ours, dtype=torch.float64, device=self._comm.device_type)
        self._comm.all_reduce(everyones, ReduceOp.MAX)
        median, self.spent_s = everyones.tolist()
        return float(max(median, FLOOR_S))
