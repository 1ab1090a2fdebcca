"""A rank as those see it who check, wrap or describe what it does: who it is, and how it names itself in an error."""

from __future__ import annotations

from typing import Protocol


class Rank(Protocol):
    """What every communicator is to the code beneath it; see `minidist.contract.membership.Membership`."""

    rank: int
    world_size: int
    timeout_s: float

    @property
    def device_type(self) -> str:
        """The kind of device whose tensors it takes."""
        ...

    @property
    def max_tag(self) -> int:
        """The largest tag of a message."""
        ...

    def who(self, operation: str) -> str:
        """Return the beginning of every message."""
        ...

    def ensure_usable(self, operation: str) -> None:
        """Raise if no operation can be started any more."""
        ...
