"""How far a rank has come, as it tells others and writes down: its last calls, and what it does now."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

WAITING, QUEUED, DONE, FAILED = "waiting", "queued", "done", "failed"
"""How far a call has come: it waits for other ranks; for calls of its own rank; for nothing; it waited in vain."""


@dataclass(frozen=True)
class Call:
    """An operation that a rank has called.

    Attributes:
        number: which collective of the communicator it is, from 1, in the order in which they run; None for one that
            is queued, and for messages.
        what: it, and what has to be the same on all ranks.
        where: the line of the user's code, if any is known.
        state: see above.
        seconds: how long ago it began, or was called if it is queued.
        took: how long it ran; None if it is not over.
        peer: with whom a message is exchanged; -1 for whoever comes, None for collectives.
    """

    number: int | None
    what: str
    where: str = ""
    state: str = DONE
    seconds: float = 0.0
    took: float | None = None
    peer: int | None = None

    @property
    def name(self) -> str:
        """The operation, with its number."""
        operation = self.what.partition(" ")[0]
        return operation if self.number is None else f"{operation} #{self.number}"

    @property
    def waits(self) -> bool:
        """Whether other ranks keep it, or kept it until it failed."""
        return self.state in (WAITING, FAILED)


@dataclass(frozen=True)
class Standing:
    """How far a rank has come on one communicator.

    Attributes:
        rank: its number there.
        num_started: how many collectives it has begun.
        calls: the last operations, the newest one last.
        inside: what of a library's the user's code is in, in the rank's own thread.
        where: at which line.
        step: that of training, if it was told.
        raised: what ended it, and where.
    """

    rank: int
    num_started: int = 0
    calls: tuple[Call, ...] = field(default=())
    inside: str = ""
    where: str = ""
    step: int | None = None
    raised: str = ""

    @property
    def place(self) -> str:
        """Where it is."""
        of_step = "" if self.step is None else f"step {self.step}"
        inside = " of ".join(filter(None, (self.inside, of_step)))
        where = f"({self.where})" if inside and self.where else self.where and f"at {self.where}"
        return " ".join(filter(None, (inside and f"in {inside}", where))) or "in no code of the user"

    @property
    def waits_in(self) -> Call | None:
        """What it waits in: a collective, or else a message."""
        waiting = [call for call in self.calls if call.waits]
        collectives = [call for call in waiting if call.number is not None]
        return next(iter(collectives or waiting), None)

    def called(self, number: int) -> Call | None:
        """Return its collective of that number, if it is among its last calls."""
        return next((call for call in self.calls if call.number == number), None)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Standing:
        """Return what `as_json` was made of.

        Raises:
            TypeError: it was not.
        """
        calls = tuple(Call(**call) for call in values.get("calls", ()))
        return cls(**{**values, "calls": calls})
