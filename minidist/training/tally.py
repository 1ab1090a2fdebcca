"""Sums over steps: of this rank alone, and of all ranks since the last log line, in an epoch, and in the run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minidist.communicator import Communicator
from minidist.training.metrics import Metrics


@dataclass
class Tally:
    """Sums over all ranks and a number of steps.

    Attributes:
        loss_sum: the samples' losses.
        num_samples: samples, counted on every rank.
        seconds: time of the slowest rank, by the clock of its communicator.
        blocked_seconds: time in which training waited for communication, the mean of the ranks.
        sent_bytes: what a rank sent while it trained, the mean of the ranks.
    """

    loss_sum: float = 0.0
    num_samples: float = 0.0
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    sent_bytes: float = 0.0

    @property
    def loss(self) -> float:
        """The mean loss per sample; nan without samples."""
        return self.loss_sum / self.num_samples if self.num_samples else math.nan

    @property
    def samples_per_s(self) -> float:
        """Samples per second, of all ranks together."""
        return self.num_samples / self.seconds if self.seconds else math.nan

    @property
    def comm_share(self) -> float:
        """The share of the time in which training waited for communication, 0 to 1."""
        return self.blocked_seconds / self.seconds if self.seconds else math.nan

    def add(self, other: Tally) -> None:
        """Add what ``other`` holds."""
        self.loss_sum += other.loss_sum
        self.num_samples += other.num_samples
        self.seconds += other.seconds
        self.blocked_seconds += other.blocked_seconds
        self.sent_bytes += other.sent_bytes


class Tallies:
    """How training went so far; the same on all ranks.

    Attributes:
        line: since the last log line.
        epoch: in this epoch.
        run: since this process began; not kept in checkpoints, since a speed is that of one run.
        metrics: the last evaluation; nan before the first one.
    """

    def __init__(self) -> None:
        self.line = Tally()
        self.epoch = Tally()
        self.run = Tally()
        self.metrics = Metrics(math.nan, math.nan, 0)

    def add(self, tally: Tally) -> None:
        """Add the steps that ``tally`` sums up."""
        self.line.add(tally)
        self.epoch.add(tally)
        self.run.add(tally)

    def end_line(self) -> Tally:
        """Return the tally for a log line and begin the next one."""
        line = self.line
        self.line = Tally()
        return line

    def start_epoch(self) -> None:
        """Begin the tally of an epoch."""
        self.epoch = Tally()

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
        return {"line": asdict(self.line), "epoch": asdict(self.epoch), "metrics": asdict(self.metrics)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what `state` returned."""
        self.line = Tally(**state["line"])
        self.epoch = Tally(**state["epoch"])
        self.metrics = Metrics(**state["metrics"])


class OwnTally:
    """This rank's steps since it was last drained; adding to it waits for no device.

    Args:
        comm: what training waits for, and its splits; its clock counts.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._num_samples = 0
        self._sent_before = self._sent
        self._untold_bytes = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time until now out, and what was sent since it was told: they were not spent on training."""
        self._since = self._comm.clock.now_s()
        self._blocked_since = self._blocked
        self._sent_before = self._sent - self._untold_bytes

    def told(self) -> None:
        """Note that what was drained has been told: what was on its way then has been sent, and is told next time."""
        self._untold_bytes = self._sent - self._sent_before

    def add(self, loss: Tensor, num_samples: int) -> None:
        """Add the mean ``loss`` of some samples."""
        self._loss_sum = self._loss_sum.to(loss.device) + loss * num_samples
        self._num_samples += num_samples

    def drain(self) -> Tally:
        """Return the sums of this rank and begin anew; waits for the device."""
        loss_sum = self._loss_sum.item()
        now = self._comm.clock.now_s()  # after .item(), so that what the device still had to compute counts
        blocked_seconds, sent = self._blocked, self._sent
        own = Tally(
            loss_sum,
            self._num_samples,
            now - self._since,
            blocked_seconds - self._blocked_since,
            sent - self._sent_before,
        )
        self._loss_sum.zero_()
        self._num_samples = 0
        self._since = now
        self._blocked_since = blocked_seconds
        self._sent_before = sent
        return own

    @property
    def _sent(self) -> int:
        return self._comm.traffic.with_splits().bytes

    @property
    def _blocked(self) -> float:
        return self._comm.traffic.with_splits().blocked_seconds
