"""Ranks that ask each other how far they have come, once one of them has waited in vain.

Over the lifeline, whose threads answer while their ranks hang, whatever in::

    rank 1 asks      1 -> 0   {"rank": 1, "channel": 0, "asks": true}         0 -> 2, 3         the same
    every rank r     r -> 0   {"rank": r, "channel": 0, "standing": {...}}    0 -> the others   the same

The standing of a rank that has not got to a channel, or is not in it, is null. All hear all answers, as all soon ask:
they wait for the same. So a rank that has just answered does not answer again, and of a rank that has left since then
its last answer is known. n ranks that ask at once cost n (n - 1) answers, of a few kilobytes each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from backends.processes.line import Message
from minidist.contract.standing import Standing

FRESH_S = 0.3
"""How old an answer may be: what keeps ranks waiting for longer than their timeout has not changed since."""
OwnStanding = Callable[[int], Standing | None]


def nothing_known(channel: int) -> Standing | None:
    """Return None: the standing of a rank that keeps no record."""
    return None


class Inquiry:
    """What this rank has heard and told; used under one lock.

    Args:
        rank: this one.
        own_standing: tells how far it has come on a channel.
        send: sends a message to all ranks but the one that it came from, as far as this rank has connections.
    """

    def __init__(self, rank: int, own_standing: OwnStanding, send: Callable[[Message, int | None], None]) -> None:
        self._rank = rank
        self._own_standing = own_standing
        self._send = send
        self._told_at: dict[int, float] = {}  # by channel
        self._heard: dict[tuple[int, int], tuple[float, Standing | None]] = {}  # by channel and rank

    def concerns(self, message: Message) -> bool:
        """Whether it is a question, or an answer."""
        return "channel" in message

    def take(self, message: Message, came_from: int) -> None:
        """Answer a question or keep an answer; pass either on if this is rank 0."""
        self._send(message, came_from)
        channel = message["channel"]
        if "standing" in message:
            standing = message["standing"]
            self._hear(channel, message["rank"], None if standing is None else Standing.of_json(standing))
        elif time.monotonic() > self._told_at.get(channel, 0.0) + FRESH_S:
            self._tell(channel)

    def _hear(self, channel: int, rank: int, standing: Standing | None) -> None:
        self._heard[channel, rank] = time.monotonic(), standing

    def _tell(self, channel: int) -> None:
        """Tell all ranks how far this one has come."""
        try:
            standing = self._own_standing(channel)
        except Exception:  # without an answer a sentence is missing; without the thread that listens, every loss
            standing = None
        self._told_at[channel] = time.monotonic()
        self._hear(channel, self._rank, standing)
        words = None if standing is None else standing.as_json()
        self._send({"rank": self._rank, "channel": channel, "standing": words}, None)

    def ask(
        self, channel: int, world_size: int, news: threading.Condition, gone: Callable[[], set[int]], timeout_s: float
    ) -> dict[int, Standing]:
        """Return how far each rank has come, as far as they answer in time; ``gone`` are those who never will."""
        asked_at = time.monotonic()
        self._tell(channel)
        self._send({"rank": self._rank, "channel": channel, "asks": True}, None)

        def known() -> dict[int, Standing | None]:
            left = gone()
            return {
                rank: standing
                for (where, rank), (at, standing) in self._heard.items()
                if where == channel and (at > asked_at - FRESH_S or rank in left)
            }

        news.wait_for(lambda: len(set(known()) | gone()) == world_size, timeout_s)
        return {rank: standing for rank, standing in sorted(known().items()) if standing is not None}
