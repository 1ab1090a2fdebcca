"""How a rank that left is reported by what moves the bytes; who catches it knows the rank's number in its own group."""

from __future__ import annotations

LEFT = "it left the group while it was needed"


class ContactLostError(ConnectionError):
    """The way to a rank that is waited for is closed, most often because that rank left.

    Attributes:
        peer: the rank, as whoever raises this counts.
    """

    def __init__(self, peer: int) -> None:
        super().__init__(f"no contact to rank {peer} any more")
        self.peer = peer
