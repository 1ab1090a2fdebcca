"""Ranks of one host that are as far apart as a network would have them: any transport, made as slow as a model says.

::

    comm=paced network=ethernet_10g comm/transport=shm

A message from one rank to another leaves at once, and its receiver waits until it would have arrived: ``alpha`` after
the slowest link of its route has served it, ``beta`` per byte, behind what others have sent on that link before. So a
card that several ranks share is shared, in and out, and nothing needs the privileges that a real network of namespaces
takes. What the transport takes itself is hidden in that time, unless it takes longer.

The models are those of `minidist.analysis.network`, and the times those of `minidist.analysis.simulate`, but for this:

- a message begins when it is sent, not when its receive is there as well: what comes early is kept for its receiver;
- what ranks reduce, and how they begin a collective, takes what it really takes, whatever ``gamma`` and ``start`` are.

A sleeping rank wakes some 0.1 ms late, and later where ranks have no core each; and a transport takes time to take a
message. Inside of a collective that must not add up from step to step, so what a rank sends next begins when it could
have without: the rank is *behind* by so much.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from backends.deadline import timed_out
from backends.executor.executor import Executor
from backends.pacing.shared_network import SharedNetwork
from backends.pacing.stamps import Stamps
from backends.schedules import DEFAULTS
from backends.wrapper import Wrapper
from minidist.analysis.network import Network
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract import checks
from minidist.contract.inner import Inner
from minidist.contract.rank import ANY_SOURCE

GLANCE_S = 0.1
"""How often a rank that waits for a message on its way looks whether another one is lost."""


class PacedCommunicator(Wrapper):
    """Another communicator with the times of a network; see `Wrapper`. All its ranks are on one host.

    Messages of two ranks arrive in the order in which they were sent. Collectives run as schedules over them, as the
    transport's own ones might not send any.

    Args:
        transport: what really moves the bytes.
        network: the model, rank 0's; or one that other communicators of these ranks use as well.
        jitter: how much later messages arrive, as a part of their alpha: random, with this mean, of an exponential
            distribution.
        seed: of that, with the rank.
        timeout_s: None for the transport's. A message that takes longer does not arrive.
        segment_bytes: see `ScheduledCommunicator`.

    Attributes:
        transport, network, segment_bytes: see above.
        behind_s: how far this rank is behind in the collective that runs.

    Raises:
        ValueError: the ranks are on several hosts or too many for the model, there is none, or jitter is negative.
    """

    def __init__(
        self,
        transport: Communicator,
        network: Network | SharedNetwork | None,
        jitter: float = 0.0,
        seed: int = 0,
        timeout_s: float | None = None,
        segment_bytes: int = 2**22,
    ) -> None:
        if network is None:
            raise ValueError("paced needs the model of a network; choose one with network=<name>")
        if not 0 <= jitter < float("inf"):
            raise ValueError(f"jitter must be at least 0, got {jitter}")
        super().__init__(transport, timeout_s)
        self.transport = transport
        self.network = network if isinstance(network, SharedNetwork) else SharedNetwork(transport, network)
        self.segment_bytes = checks.segment_bytes(segment_bytes)
        self.overlaps = True  # who waits for a message on its way leaves its core to others
        self._jitter = jitter
        self._seed = seed
        self._random = random.Random(f"{seed} {transport.rank}")
        self._stamps = Stamps(transport)
        self.behind_s = 0.0
        self._last_at = [0.0] * self.world_size  # by rank, when the last message to it arrives
        self._executor = Executor(Inner(self), DEFAULTS, self._schedule_tag, segment_bytes, proves=False)

    def _collective(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = getattr(self._executor, name)
        return hook

    def _agree(
        self, collective: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int, timeout_s: float
    ) -> float:
        left_s = super()._agree(collective, numel, dtype, op, root, timeout_s)
        self.behind_s = 0.0  # a schedule begins now, and what was before it is no part of it
        return left_s

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        now = time.monotonic()
        in_schedule = self.in_schedule(tag)
        at, alpha = self.network.send(self.rank, dst, tensor.nbytes, now - self.behind_s if in_schedule else now)
        if self._jitter:
            at += alpha * self._jitter * self._random.expovariate(1.0)
        self._last_at[dst] = at = max(at, self._last_at[dst])
        self._stamps.put(dst, tag, at)
        work = super()._isend(tensor, dst, tag, timeout_s)
        if in_schedule:
            self.behind_s += time.monotonic() - now
        return _Message(self, work, dst, tag, timeout_s, lambda peer: at)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        now = time.monotonic()
        work = super()._irecv(tensor, src, tag, timeout_s)
        if self.in_schedule(tag):
            self.behind_s += time.monotonic() - now
        return _Message(self, work, src, tag, timeout_s, lambda peer: self._stamps.take(peer, tag))

    def in_schedule(self, tag: int) -> bool:
        """Whether a message with this tag, as the hooks get it, is a part of a schedule."""
        place: int = tag % (1 << self.tag_bits)
        return place == self.max_tag + 2

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        child = self._inner.split(groups)
        if child is None:
            return None
        ranks = next(group for group in groups if self.rank in group)
        return PacedCommunicator(
            child, self.network.among(ranks), self._jitter, self._seed, self.timeout_s, self.segment_bytes
        )


class _Message(Work):
    """A message that has ended when it was really moved, and would have arrived.

    Args:
        comm: whose it is.
        work: it, beneath.
        peer: the other end, or ANY_SOURCE.
        tag: as the hooks get it.
        timeout_s: how long it may take.
        arrival: returns when a message with this peer arrives; None if nothing is known of it.
    """

    def __init__(
        self,
        comm: PacedCommunicator,
        work: Work,
        peer: int,
        tag: int,
        timeout_s: float,
        arrival: Callable[[int], float | None],
    ) -> None:
        self._comm = comm
        self._work = work
        self._given = peer
        self._in_schedule = comm.in_schedule(tag)
        self._timeout_s = timeout_s
        self._give_up_at = time.monotonic() + timeout_s
        self._arrival = arrival
        self._at: float | None = None
        self._lock = threading.Lock()  # one thread may wait for it, and another ask whether it is done

    def wait(self) -> None:
        should_be = time.monotonic() - self._comm.behind_s
        self._work.wait()
        self.peer = self._work.peer if self._given == ANY_SOURCE else self._given
        at = self._arrives_at()
        assert at is not None, "a stamp is written before its message is sent"
        until = min(at, self._give_up_at)
        while (left_s := until - time.monotonic()) > 0:
            if self._comm._gone():
                raise self._comm._lost()
            time.sleep(min(left_s, GLANCE_S))
        if at > self._give_up_at:
            raise timed_out(self._timeout_s, self.peer)
        if self._in_schedule:
            self._comm.behind_s = time.monotonic() - max(should_be, at)

    def is_done(self) -> bool:
        if not self._work.is_done():
            return False
        at = self._arrives_at()
        return at is None or time.monotonic() >= min(at, self._give_up_at)

    def exception(self) -> BaseException | None:
        return self._work.exception()

    def _arrives_at(self) -> float | None:
        """Return when it arrives, once it was really moved; None if it never was, which a wait says."""
        with self._lock:
            if self._at is None:
                peer = self._work.peer if self._given == ANY_SOURCE else self._given
                self._at = None if peer is None else self._arrival(peer)
            return self._at
