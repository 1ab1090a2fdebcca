"""The roll call: what ranks tell each other while they train.

A *roll call* is one small all-gather, in which every rank says what its steps since the last one summed up to,
whether a loss was not finite, and whether it was asked to stop. It is held at steps that every rank knows beforehand
(log points, checkpoints, the end of an epoch) and, in between, about once per second. So a SIGTERM on one rank stops
all of them after the same step, and fast steps pay nothing.

When the next one is due in between must not depend on a rank's own clock: one rank would hold it and the others
would not. So the ranks count steps. From the seconds that they told, which all have gathered alike, each derives the
same number of steps to go::

    step        1   3       7               15                  ...   40                     65
    roll call   x   x       x               x   twice as far each time,   then a second's worth   x
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidist.communicator import Communicator
from minidist.training.finite import FirstBadStep, ensure_finite
from minidist.training.stop import StopSignal
from minidist.training.tally import OwnTally, Tally

SECONDS_BETWEEN_ROLL_CALLS = 1.0


class RollCall:
    """This rank's part in the roll calls.

    Args:
        comm: the ranks that train.
        stop_signal: says whether this rank was asked to stop.

    Attributes:
        stopping: whether some rank was asked to stop; the same on all ranks.
    """

    def __init__(self, comm: Communicator, stop_signal: StopSignal) -> None:
        self._comm = comm
        self._stop_signal = stop_signal
        self._own = OwnTally(comm)
        self._first_bad_step = FirstBadStep()
        self.stopping = False
        self._last_step = 0
        self._next_step = 0

    def start(self, step: int) -> None:
        """Begin to train after ``step`` steps."""
        self.stopping = False
        self._last_step = step
        self._next_step = step + 1

    def restart_clock(self) -> None:
        """Leave the time since the last roll call out: it was not spent on training."""
        self._own.restart_clock()

    def note(self, loss: Tensor, num_samples: int, step: int) -> None:
        """Note the mean ``loss`` of some samples of ``step``, to be told in the next roll call; waits for no device."""
        loss = loss.detach().double()
        self._own.add(loss, num_samples)
        self._first_bad_step.note(loss, step)

    def due(self, step: int, wanted: bool) -> bool:
        """Return whether ranks hold a roll call after ``step``, if they have not yet.

        Args:
            step: optimizer steps so far.
            wanted: there is a reason for it which all ranks know.
        """
        return step > self._last_step and (wanted or step >= self._next_step)

    def hold(self, epoch: int, step: int) -> Tally:
        """Tell the other ranks how it went, learn how they fared, and return the sum. Collective.

        Raises:
            FloatingPointError: on every rank, if a rank's loss was not finite.
        """
        told = self._gather()
        ensure_finite(told["first_bad_step"], epoch, self._comm.who("Engine.fit"))
        self.stopping = self.stopping or bool(told["stop"].any())
        tally = Tally(
            loss_sum=told["loss_sum"].sum().item(),
            num_samples=told["num_samples"].sum().item(),
            seconds=told["seconds"].max().item(),
            blocked_seconds=told["blocked_seconds"].mean().item(),
            sent_bytes=told["sent_bytes"].mean().item(),
        )
        self._plan_next(step, tally.seconds)
        return tally

    def _gather(self) -> dict[str, Tensor]:
        """Return what each rank has to tell: by name, a vector with an element per rank."""
        first_bad_step = self._first_bad_step.read()
        own = self._own.drain()
        mine = {
            "loss_sum": own.loss_sum,
            "num_samples": own.num_samples,
            "seconds": own.seconds,
            "blocked_seconds": own.blocked_seconds,
            "sent_bytes": own.sent_bytes,
            "first_bad_step": first_bad_step,
            "stop": self._stop_signal.received,
        }
        # float64 holds every count and step exactly up to 2**53, so that one tensor does for all of them.
        row = torch.tensor(list(mine.values()), dtype=torch.float64, device=self._comm.device_type)
        rows = row.new_empty((self._comm.world_size, len(mine)))
        self._comm.all_gather(rows, row)
        self._own.told()
        return dict(zip(mine, rows.cpu().unbind(dim=1), strict=True))

    def _plan_next(self, step: int, seconds: float) -> None:
        num_steps = step - self._last_step
        steps_per_s = num_steps / max(seconds, 1e-9)  # a clock may stand still for as long as a tiny step takes
        # At most twice as far as the last time, since the first steps (compilation, caches) say little about the next.
        num_ahead = min(int(SECONDS_BETWEEN_ROLL_CALLS * steps_per_s), 2 * num_steps)
        self._last_step = step
        self._next_step = step + num_ahead
