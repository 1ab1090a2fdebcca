"""The clock of a virtual rank: computing moves it, and so does waiting for others; nothing else does.

A rank has a *hand* for what it computes itself, and one for each operation that runs beside that, in another thread.
All hands of one process tell the time on several networks at once: what is computed does not depend on the network, so
one run gives the times of all. The first network is the one that `VirtualClock.now_s` speaks of.

::

    own hand   | forward | backward ..... starts | goes on ......... | waits ------> | optimizer
    operation                             | all-reduce ----------------------------> |
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minidist.contract.clock import Clock

Times = NDArray[np.float64]
"""Seconds, one per network."""
FORWARD = 1 / 3
"""The part of a step before its backward pass: that takes about twice as long as the forward pass."""


@dataclass(frozen=True)
class Pace:
    """How long ranks compute.

    Args:
        step_s: seconds of a training step; None measures what each rank really computes.
        spread: how much steps differ: each takes a factor of 1 more or less a number with this standard deviation.
        slow_ranks: ranks that take ``slow_factor`` times as long.
        slow_factor: at least 1.
        seed: of the spread, with the rank.

    Raises:
        ValueError: a value is out of range.
    """

    step_s: float | None = None
    spread: float = 0.0
    slow_ranks: Sequence[int] = ()
    slow_factor: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step_s is not None and not 0 < self.step_s < float("inf"):
            raise ValueError(f"step_s must be greater than 0, or null to measure, got {self.step_s}")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread must be at least 0 and less than 1, got {self.spread}")
        if not 1 <= self.slow_factor < float("inf"):
            raise ValueError(f"slow_factor must be at least 1, got {self.slow_factor}")

    def ensure_ranks(self, world_size: int) -> None:
        """Refuse slow ranks that do not exist."""
        for rank in self.slow_ranks:
            if rank not in range(world_size):
                raise ValueError(f"slow_ranks must be of 0 to {world_size - 1}, got {rank}")


class Hand:
    """One time that goes on.

    Attributes:
        at: the time, on each network.
        waited: seconds that it moved because others, or the network, were not ready.
    """

    def __init__(self, at: Times) -> None:
        self.at = at
        self.waited = np.zeros_like(at)
        self._thread = threading.get_ident()
        self._cpu_s = time.thread_time()

    def compute(self, factor: float) -> None:
        """Go on by what this thread has computed since the last time, times ``factor``."""
        thread, cpu_s = threading.get_ident(), time.thread_time()
        if thread == self._thread:  # another thread's time says nothing of this one's
            self.at = self.at + (cpu_s - self._cpu_s) * factor
        self._thread, self._cpu_s = thread, cpu_s

    def leave_out(self) -> None:
        """Do not count what was computed since the last time: it was the transport's work."""
        self._thread, self._cpu_s = threading.get_ident(), time.thread_time()

    def wait_until(self, at: Times) -> None:
        """Go on to ``at``, where that is later."""
        self.waited = self.waited + np.maximum(at - self.at, 0.0)
        self.at = np.maximum(at, self.at)


class VirtualClock(Clock):
    """The clock of one rank.

    Where a step is given its seconds, what the rank starts in the background is taken to be buckets: the k-th of as
    many as the step before had starts after the forward pass and so much of the backward pass, the last one at its end.
    What it waits for at once, or starts between two steps, starts where the rank is.

    Args:
        pace: how long this rank computes.
        rank: which one it is.
        num_networks: how many times it tells.
    """

    def __init__(self, pace: Pace, rank: int, num_networks: int) -> None:
        self._pace = pace
        self._random = random.Random(f"{pace.seed} {rank}")
        self._slow = pace.slow_factor if rank in pace.slow_ranks else 1.0
        self._here = threading.local()
        self.own = Hand(np.zeros(num_networks))
        self._num_started = self._num_before = 0
        self._is_between_steps = False
        self._done = 0.0  # the part of this step that is computed
        self._factor = self._draw()
        self.now_s = lambda: float(self.times()[0])

    def times(self) -> Times:
        """Return the time on each network."""
        return self.computed().at

    def step_done(self) -> None:
        if self._pace.step_s is not None:
            self._go_on_to(1.0)
        else:
            self.computed()
        self._done = 0.0
        self._num_before, self._num_started = self._num_started, 0
        self._factor = self._draw()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        self._is_between_steps = True
        try:
            yield
        finally:
            self._is_between_steps = False

    def computed(self) -> Hand:
        """Return the hand of this thread, after what it has computed until now."""
        hand: Hand = getattr(self._here, "hand", self.own)
        if self._pace.step_s is None:
            hand.compute(self._factor)
        return hand

    def starts(self) -> None:
        """Take note that an operation starts that goes on in the background."""
        if self._is_between_steps:
            return
        self._num_started += 1
        if self._pace.step_s is not None:
            share = min(self._num_started / self._num_before, 1.0) if self._num_before else 1.0
            self._go_on_to(FORWARD + (1 - FORWARD) * share)

    def lay_hand(self, hand: Hand) -> None:
        """Let ``hand`` tell the time in this thread, instead of the rank's own, until another one does."""
        self._here.hand = hand

    def _go_on_to(self, done: float) -> None:
        assert self._pace.step_s is not None
        self.own.at = self.own.at + self._pace.step_s * self._factor * max(done - self._done, 0.0)
        self._done = max(done, self._done)

    def _draw(self) -> float:
        spread = self._random.gauss(0.0, self._pace.spread) if self._pace.spread else 0.0
        return self._slow * max(1.0 + spread, 0.1)
