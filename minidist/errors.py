"""What can go wrong between ranks, as one tree of exceptions.

Wrong arguments are not in it: they raise ValueError or TypeError on the rank that made the mistake,
before a byte is sent. Every message reads ``[rank 1/4] all_reduce: what happened; what to do``.
"""


class CommError(RuntimeError):
    """A communicator could not do what it was asked; the communicator is unusable afterwards."""


class CommTimeoutError(CommError, TimeoutError):
    """An operation did not complete in time: most often a rank did not take part in it."""


class PeerLostError(CommError):
    """A rank died, raised, aborted or left while others still needed it.

    Attributes:
        peers: the ranks known to be gone, lowest first; empty where the backend cannot tell.
    """

    def __init__(self, message: str, peers: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.peers = peers


class MismatchError(CommError):
    """Ranks disagree: other models, or other arguments to one collective."""


class CommClosedError(CommError):
    """The communicator was used after ``close()`` or ``abort()``."""


class BackendUnavailableError(CommError, ImportError):
    """A backend cannot run here: a package, a library, a device or a launcher is missing."""


class ScheduleError(CommError, ValueError):
    """A schedule does not do what its collective promises; nothing was sent."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit what it is loaded into."""


class ConfigError(ValueError):
    """A configuration value is out of range; the message names its key."""
