"""Runs a schedule on a virtual clock, under a model of the network.

All ranks run in the order of time, as in execution.py: a transfer begins when both of its ends are posted, takes what
network.py says, and a step ends with the last of its transfers; a reduction takes gamma per byte more. So the clock
shows what the closed formulas show where these exist, and goes on where they end: shared links, slow ranks, other
numbers of ranks.

Where a schedule says that all ranks step alike, as a ring does, and no two messages can share a link, all ranks are one
array, the schedule is asked once for all of them, and thousands of ranks take seconds. The times are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minidist.analysis.execution import MAX_STEPS, Execution, RankState, ensure_size
from minidist.analysis.network import Link, Network, Ranks, Route, Seconds
from minidist.analysis.rules import counted_chunks
from minidist.collective import Run
from minidist.errors import ScheduleError
from minidist.schedule import Recv, Reduce, Schedule, Send, Step, Transfer, indices, steps_alike

MAX_WORLD_SIZE = 65_536


class Message(NamedTuple):
    """One transfer on the clock.

    Attributes:
        src, dst: its ranks.
        src_step, dst_step: the steps of theirs in which it travels.
        sent, received: the chunks on both sides.
        reduces: whether it is combined with what is there.
        nbytes: its size.
        begins, ends: seconds; a reduction is not in them.
    """

    src: int
    dst: int
    src_step: int
    dst_step: int
    sent: Sequence[int]
    received: Sequence[int]
    reduces: bool
    nbytes: float
    begins: float
    ends: float


@dataclass(frozen=True)
class Timeline:
    """What happened when.

    Attributes:
        ends: when each rank has finished, in seconds; 0 is the start, unless ranks have times of their own.
        num_messages: how many were sent.
        messages: all of them, in the order in which they began; empty unless they were recorded.
    """

    ends: Sequence[float]
    num_messages: int
    messages: list[Message] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """When the last rank has finished."""
        return max(self.ends)


def simulate(
    schedule: Schedule,
    run: Run,
    nbytes: float,
    network: Network,
    record: bool = False,
    starts: Sequence[float] | None = None,
) -> Timeline:
    """Run ``schedule`` on ranks that start together, or at times of their own, and return when everything happened.

    Args:
        schedule: see `minidist.schedule`.
        run: the collective and its ranks, 1 to MAX_WORLD_SIZE of them: ``Run("all_reduce", 1024)``.
        nbytes: of the larger tensor of the collective, whose chunks are equal parts; a barrier has none.
        network: what a message takes.
        record: whether to keep every message.
        starts: when each rank starts, in seconds; None for 0.

    Raises:
        ScheduleError: the schedule cannot be run; `minidist.analysis.prove` says whether it is right.
        ValueError: an argument is out of range.
    """
    if not nbytes >= 0:
        raise ValueError(f"nbytes must be 0 or more, got {nbytes}")
    if starts is not None and len(starts) != run.world_size:
        raise ValueError(f"starts must have a time for each of the {run.world_size} ranks, got {len(starts)}")
    begins = np.full(run.world_size, network.start) + (0.0 if starts is None else np.asarray(starts))
    everyone = np.arange(run.world_size)
    if not record and steps_alike(schedule) and network.alone(everyone, everyone) is not None:
        return _Together(schedule, run, nbytes, network).timeline(begins)
    simulation = _OneByOne(schedule, run, nbytes, network, record)
    simulation.execute(begins.tolist())
    return Timeline([rank.ends for rank in simulation.ranks], simulation.num_messages, simulation.messages)


def _chunk_bytes(run: Run, num_chunks: int, nbytes: float) -> float:
    """Return the size of a chunk: scratch has chunks as large as the others, and a barrier moves tokens of a byte."""
    if not run.collective.has_tensor:
        return 1.0
    return nbytes / (run.world_size if run.collective.has_scratch else num_chunks)


class _OneByOne(Execution):
    """All ranks on one clock, each with its own steps."""

    def __init__(self, schedule: Schedule, run: Run, nbytes: float, network: Network, record: bool) -> None:
        super().__init__(schedule, run, MAX_WORLD_SIZE)
        self._chunk_bytes = _chunk_bytes(run, self.num_chunks, nbytes)
        self._network = network
        self._record = record
        self._free: dict[Any, float] = {}  # by link: when it has served all that came to it
        # Routes are asked for once: a schedule has few pairs and sizes, and very many messages.
        self._routes: dict[tuple[int, int, float, bool], Route] = {}
        self.messages: list[Message] = []
        self.num_messages = 0

    def posted(self, rank: RankState, send: Send) -> None:
        return

    def step_ended(self, rank: RankState) -> None:
        return

    def met(
        self, sender: RankState, send: Send, message: Any, receiver: RankState, receive: Transfer, time: float
    ) -> None:
        chunks = indices(send.chunk)
        nbytes = self._chunk_bytes * len(chunks)
        pair = (sender.rank, receiver.rank)
        key = (*pair, nbytes, isinstance(receive, Reduce))
        if key not in self._routes:
            self._routes[key] = self._network.route(*key)
        alpha, links = self._routes[key]
        # Alpha is a delay and no work: a link that has served a message takes the next one while this one travels.
        ends = self._served(links, nbytes, time) + alpha
        sender.ends = max(sender.ends, ends)
        self.num_messages += 1
        if self._record:
            steps = (sender.step, receiver.step)
            reduces = isinstance(receive, Reduce)
            places = (chunks, indices(receive.chunk))
            self.messages.append(Message(*pair, *steps, *places, reduces, nbytes, time, ends))
        # The sender is done when its message has arrived. The receiver adds up one message after the other, so they
        # queue for it as they do for a link.
        if isinstance(receive, Reduce):
            ends = self._served(self._network.reduction(receiver.rank, nbytes), nbytes, ends)
        receiver.ends = max(receiver.ends, ends)

    def _served(self, links: Sequence[Link], nbytes: float, time: float) -> float:
        """Return when the slowest of the links has served so many bytes, which come to it at ``time``."""
        # Each link for itself, and the slowest counts: bytes flow through all of them at once, not one after another.
        # A message waits for those that came before it, which `Execution` calls in the order of time.
        served = time
        for name, beta in links:
            self._free[name] = free = max(time, self._free.get(name, 0.0)) + beta * nbytes
            served = max(served, free)
        return served


class _Together:
    """All ranks as one array, for a schedule in which they step alike and a network on which they do not meet.

    Its rank is the array of all ranks, so its peers and chunks are arrays too: element r is what rank r does.
    """

    def __init__(self, schedule: Schedule, run: Run, nbytes: float, network: Network) -> None:
        ensure_size(run, MAX_WORLD_SIZE)
        self._schedule = schedule
        self._run = run
        self._network = network
        self._num_chunks = counted_chunks(schedule, run)
        self._chunk_bytes = _chunk_bytes(run, self._num_chunks, nbytes)
        self._everyone = np.arange(run.world_size)

    def timeline(self, now: Seconds) -> Timeline:
        """Run all steps, from where each rank is now."""
        gammas = self._network.gammas(self._run.world_size)
        number = 0
        for step in self._schedule(self._everyone, *self._run.arguments):
            if number >= MAX_STEPS:
                raise ScheduleError(f"it takes more than {MAX_STEPS} steps; does it end?")
            now = self._step(number, step, now, gammas)
            number += 1
        return Timeline(list(now.tolist()), number * self._run.world_size)

    def _step(self, number: int, step: Step, now: Seconds, gammas: Seconds) -> Seconds:
        """Return when each rank ends a step in which it sends one message and receives one."""
        send, receive = _both_ends(number, step)
        dst = self._by_rank(number, "ranks", send.peer, self._run.world_size)
        src = self._by_rank(number, "ranks", receive.peer, self._run.world_size)
        self._ensure_meeting(number, send, receive, dst, src)
        alone = self._network.alone(self._everyone, dst)
        assert alone is not None  # on such a network it never is
        nbytes = self._chunk_bytes * len(indices(send.chunk))
        # A message begins when both of its ends are there, and a rank goes on when its message has arrived elsewhere
        # and what it receives has arrived here and is reduced.
        arrives = np.maximum(now, now[dst]) + alone[0] + alone[1] * nbytes
        reduced = gammas * nbytes if isinstance(receive, Reduce) else 0.0
        ends: Seconds = np.maximum(arrives, arrives[src] + reduced)
        return ends

    def _ensure_meeting(self, number: int, send: Send, receive: Transfer, dst: Ranks, src: Ranks) -> None:
        """Refuse a step in which the messages of some ranks do not meet their receives."""
        sent = self._chunks(number, send)
        received = self._chunks(number, receive)
        # Who I send to receives from me; with that, no rank can be the target of two, as it names one source.
        if not np.array_equal(src[dst], self._everyone) or np.any(dst == self._everyone):
            raise ScheduleError(f"step {number}: a rank sends to one that does not receive from it")
        # The chunks of a tensor that is cut may differ by one element.
        may_differ = self._run.collective.is_cut
        if not 0 < len(sent) == len(received) or (may_differ and not np.array_equal(sent[:, src], received)):
            raise ScheduleError(f"step {number}: ranks send other chunks than the ones that are expected, or none")

    def _chunks(self, number: int, move: Transfer) -> Ranks:
        """Return, for each chunk that a message names, which one it is for each rank."""
        return np.array([self._by_rank(number, "chunks", chunk, self._num_chunks) for chunk in indices(move.chunk)])

    def _by_rank(self, number: int, what: str, given: Any, count: int) -> Ranks:
        """Return what each rank names, where it is one of ``count``.

        An index below 0 is none to a schedule, but it is one to numpy, so it has to be found here.
        """
        # What is the same for all ranks is a number, and has to become an array as long as the others.
        found = np.broadcast_to(np.asarray(given), self._everyone.shape)
        is_wrong = (found < 0) | (found >= count) if found.dtype.kind == "i" else np.full(found.shape, True)
        if is_wrong.any():
            rank = int(is_wrong.argmax())
            raise ScheduleError(f"step {number}: the {what} are 0 to {count - 1}, got {found[rank]} on rank {rank}")
        return found


def _both_ends(number: int, step: Step) -> tuple[Send, Transfer]:
    """Return what every rank sends in a step, and what it receives."""
    if isinstance(step, tuple) and len(step) == 2:
        for send, receive in (step, step[::-1]):
            if isinstance(send, Send) and isinstance(receive, Recv | Reduce):
                return send, receive
    raise ScheduleError(f"step {number}: where all ranks step alike, each sends one message and receives one")
