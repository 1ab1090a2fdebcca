"""A rank as those see it who check, wrap or describe what it does: who it is, and how it names itself in an error."""

from __future__ import annotations

from typing import Protocol

ANY_SOURCE = -1
"""What stands for ``src`` beneath the public methods where a receive leaves open whom it comes from."""


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
    def receives_from_any(self) -> bool:
        """Whether a receive may leave open whom it comes from."""
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
