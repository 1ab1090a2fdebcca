"""What a communicator has moved so far."""

from __future__ import annotations

from dataclasses import dataclass, field


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
        splits: those of the communicators that were split off this one.
    """

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    splits: list[Traffic] = field(default_factory=list)

    def with_splits(self) -> Traffic:
        """Return the sum of this, of what was split off, and of what was split off that."""
        whole = Traffic(self.messages, self.bytes, self.seconds, self.blocked_seconds)
        for split in self.splits:
            other = split.with_splits()
            whole.count(other.bytes, other.messages)
            whole.seconds += other.seconds
            whole.blocked_seconds += other.blocked_seconds
        return whole

    def count(self, nbytes: int, messages: int = 1) -> None:
        """Add messages of ``nbytes`` together."""
        self.messages += messages
        self.bytes += nbytes

    def add_blocked(self, seconds: float) -> None:
        """Add an operation that ran while its caller waited for it."""
        self.seconds += seconds
        self.blocked_seconds += seconds
