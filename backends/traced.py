"""A transport that writes down when each message was sent and when it had come: a timeline of what really happened."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from backends.wrapper import Wrapper
from minidist.analysis.simulate import Message
from minidist.communicator import Communicator, Work


class Entry(NamedTuple):
    """One end of a message.

    Attributes:
        sends: whether it is the end that sends.
        peer: the other end.
        nbytes: its size.
        posted, ended: `time.perf_counter` when it was posted, and when it was seen to have ended.
    """

    sends: bool
    peer: int
    nbytes: int
    posted: float
    ended: float


class TracedCommunicator(Wrapper):
    """Another communicator, with a log of its messages; see `Wrapper`.

    A message has ended when its rank came to look for it, not when it came: what arrives while a rank reduces something
    else is seen late.

    Attributes:
        log: what this rank has sent and received, in the order in which it ended.
    """

    def __init__(self, transport: Communicator) -> None:
        super().__init__(transport)
        self.log: list[Entry] = []

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        posted = time.perf_counter()  # a transport may send within the call
        return self._logged(True, dst, tensor.nbytes, posted, super()._isend(tensor, dst, tag, timeout_s))

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        posted = time.perf_counter()
        return self._logged(False, src, tensor.nbytes, posted, super()._irecv(tensor, src, tag, timeout_s))

    def _logged(self, sends: bool, peer: int, nbytes: int, posted: float, work: Work) -> Work:
        def log() -> None:
            known = peer if work.peer is None else work.peer
            self.log.append(Entry(sends, known, nbytes, posted, time.perf_counter()))

        return work.then(log)


def timed(plan: Iterable[Message], logs: list[list[Entry]]) -> list[Message]:
    """Return the messages of a simulated run with the times of a real one of the same schedule.

    The clock starts when the first message was posted; the clocks of all ranks have to be one, as on one host.

    Args:
        plan: the messages of `simulate`, with ``record=True``.
        logs: of every rank, each with one run of the collective, whose messages were not cut into segments.

    Raises:
        ValueError: the logs hold other messages than the plan.
    """
    start = min((entry.posted for log in logs for entry in log), default=0.0)
    sent = _by_pair((rank, entry.peer, entry) for rank, log in enumerate(logs) for entry in log if entry.sends)
    come = _by_pair((entry.peer, rank, entry) for rank, log in enumerate(logs) for entry in log if not entry.sends)
    messages = []
    for message in plan:
        pair = message.src, message.dst
        if not sent[pair] or not come[pair]:
            raise ValueError(f"the log of rank {message.src} has no further message to rank {message.dst}")
        send = sent[pair].popleft()
        receive = come[pair].popleft()
        messages.append(message._replace(nbytes=send.nbytes, begins=send.posted - start, ends=receive.ended - start))
    if any(sent.values()) or any(come.values()):
        raise ValueError("the logs hold messages that are not in the plan")
    return sorted(messages, key=lambda message: message.begins)


def _by_pair(entries: Iterable[tuple[int, int, Entry]]) -> dict[tuple[int, int], deque[Entry]]:
    """Return the entries of each pair of ranks in the order in which they were posted."""
    found: dict[tuple[int, int], deque[Entry]] = defaultdict(deque)
    for src, dst, entry in sorted(entries, key=lambda one: one[2].posted):
        found[src, dst].append(entry)
    return found
