"""How a rank that left is reported by what moves the bytes; who catches it knows the rank's number in its own group."""

from __future__ import annotations

from collections.abc import Collection

from minidist.contract.rank import ANY_SOURCE

LEFT = "it left the group while it was needed"


class ContactLostError(ConnectionError):
    """The way to a rank that is waited for is closed, most often because that rank left.

    Attributes:
        peer: the rank, as whoever raises this counts.
    """

    def __init__(self, peer: int) -> None:
        super().__init__(f"no contact to rank {peer} any more")
        self.peer = peer


def contact_lost(peer: int, left: Collection[int], world_size: int) -> ContactLostError | None:
    """Return an error if ``peer`` is among those that have ``left``; with ANY_SOURCE, if all other ranks are."""
    if peer in left:
        return ContactLostError(peer)
    if peer == ANY_SOURCE and len(left) == world_size - 1:
        return ContactLostError(min(left))
    return None
