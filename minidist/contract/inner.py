"""What one communicator may use of another that it is built around or runs over: its hooks, by names of their own.

Nobody else reads the hooks of a communicator, whose names begin with an underscore. They lie beneath the front: no
checks, no staging, no order. So they take what the front has let through, in the thread of the front's own operation.
"""

from __future__ import annotations

from typing import final

from minidist.communicator import Communicator


@final
class Inner:
    """The hooks of ``comm``.

    Attributes:
        comm: the communicator, whose public side is free to use too.
        isend, irecv: ``(tensor, peer, tag, timeout_s)`` start a message and return its Work; the tag with the channel.
        collective: ``(name)`` returns what runs that collective, see `Communicator._collective`.
        agree: ``(collective, numel, dtype, op, root, timeout_s)`` before a schedule runs over its messages.
        whole: ``(schedule, run, numel, dtype, tag)`` returns what runs a schedule without them, if there is something.
        dispatch: ``(run, async_op)`` runs an operation in the order of all that it was given.
        split: ``(groups)`` returns the communicator of this rank's group, see `Communicator._split`; all ranks call it.
        standings: ``(channel, timeout_s)`` asks the ranks how far they have come, see `Communicator._standings`.
        gone, translate: the ranks that are lost, and what an error of its library means.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.isend = comm._isend
        self.irecv = comm._irecv
        self.collective = comm._collective
        self.agree = comm._agree
        self.whole = comm._whole
        self.dispatch = comm._dispatch
        self.split = comm._split
        self.standings = comm._standings
        self.gone = comm._gone
        self.translate = comm._translate

    def adopt(self, outer: Communicator) -> None:
        """Give ``outer``, of the same ranks, a channel of its own; it shares order, counts, clock and record.

        All ranks call it. Operations of several communicators on one transport would otherwise meet on it in an order
        that differs between ranks.
        """
        outer.traffic = self.comm.traffic
        outer.recorder = self.comm.recorder
        outer._progress = self.comm._progress
        outer.overlaps = self.comm.overlaps
        outer.checks_sizes = self.comm.checks_sizes
        outer.checks_dtypes = self.comm.checks_dtypes
        outer.receives_from_any = self.comm.receives_from_any
        self._move(outer, self.comm._new_channel())

    def put_on_channel(self, outer: Communicator, channel: int) -> None:
        """Let the messages of ``outer``, some of these ranks, travel on a channel that `_new_channel` has given."""
        self._move(outer, channel)
        outer.recorder.channel = channel
        outer._root._recorders[channel] = outer.recorder

    def _move(self, outer: Communicator, channel: int) -> None:
        outer._root = self.comm._root
        outer._channel = channel
        outer.clock = self.comm.clock
        outer.tag_bits = self.comm.tag_bits
