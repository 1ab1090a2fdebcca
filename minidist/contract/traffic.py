"""What a communicator has moved so far."""

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Running totals of one rank's communicator; never reset, so take differences.

    Attributes:
        messages: messages that this rank sent. A collective that runs as a schedule counts every
            message of the schedule; one that a library runs natively counts as one message.
        bytes: the payload of those messages, in bytes.
        seconds: time that operations ran, in the background or not.
        blocked_seconds: time that the caller spent waiting for them; the difference to ``seconds``
            was hidden behind other work. On nccl both hold only the time spent on the host.
    """

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    blocked_seconds: float = 0.0

    def count(self, nbytes: int, messages: int = 1) -> None:
        """Add messages of ``nbytes`` together."""
        self.messages += messages
        self.bytes += nbytes

    def add_blocked(self, seconds: float) -> None:
        """Add an operation that ran while its caller waited for it."""
        self.seconds += seconds
        self.blocked_seconds += seconds
