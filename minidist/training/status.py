"""What ranks tell each other while they train: how it goes, and whether to stop.

One small all-gather, the *status exchange*, carries it all. It runs at steps that every rank knows (log
points, checkpoints, the end of an epoch) and, in between, about once per second: after each exchange
all ranks derive the step of the next one from the same gathered step time. So a SIGTERM on one rank
stops all of them after the same step, and fast steps pay nothing.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from minidist.communicator import Communicator
from minidist.training.metrics import Metrics

SECONDS_BETWEEN_EXCHANGES = 1.0


@dataclass
class Tally:
    """Sums over all ranks and a number of steps.

    Attributes:
        loss_sum: the samples' losses.
        num_samples: samples, counted on every rank.
        seconds: wall time of the slowest rank.
        blocked_seconds: time in which training waited for communication, the mean of the ranks.
    """

    loss_sum: float = 0.0
    num_samples: float = 0.0
    seconds: float = 0.0
    blocked_seconds: float = 0.0

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
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class StopSignal:
    """Notes SIGTERM, where it would otherwise end the process, for as long as it is entered.

    The first one is noted, a second one does what it did before. Python delivers signals to the main
    thread only; entered in another one, it notes nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> Self:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)


class Status:
    """This rank's part in the status exchange, and the tallies that come of it.

    Attributes:
        stop_signal: enter it while training, so that a SIGTERM is noted.
        stopping: whether some rank was asked to stop; the same on all ranks.
        last_step: the step of the last exchange.
        line, epoch, run: tallies since the last log line, of this epoch, and of this process's training.
        metrics: the last evaluation; nan before the first one.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.stop_signal = StopSignal()
        self.stopping = False
        self.line, self.epoch, self.run = Tally(), Tally(), Tally()
        self.metrics = Metrics(math.nan, math.nan, 0)
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._first_bad_step = torch.full((), math.inf, dtype=torch.float64)
        self._num_samples = 0
        self.last_step = self._next_step = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last exchange out of the tallies: it was not spent on training."""
        self._since = time.perf_counter()
        self._blocked_since = self._comm.traffic.blocked_seconds

    def start(self, step: int) -> None:
        """Begin to train after ``step`` steps."""
        self.stopping = False
        self.last_step, self._next_step = step, step + 1

    def start_epoch(self, resumed: bool) -> None:
        """Begin an epoch, or go on in the middle of it if ``resumed``."""
        if not resumed:
            self.epoch = Tally()
        self.restart_clock()

    def add(self, loss: Tensor, num_samples: int, step: int) -> None:
        """Note the mean ``loss`` of some samples of step ``step``, without waiting for the device."""
        loss = loss.detach().double()
        self._loss_sum = self._loss_sum.to(loss.device) + loss * num_samples
        first_bad_step = self._first_bad_step.to(loss.device)
        self._first_bad_step = torch.where(loss.isfinite(), first_bad_step, first_bad_step.clamp(max=step))
        self._num_samples += num_samples

    def evaluated(self, metrics: Metrics) -> None:
        """Note an evaluation between epochs.

        Raises:
            ValueError: on every rank, if it saw no sample.
        """
        if not metrics.num_samples:
            raise ValueError(
                f"{self._comm.who('Engine.fit')}: the eval_loader gave no sample on any rank; "
                "give one that can be read again in each epoch, such as a DataLoader or a list"
            )
        self.metrics = metrics

    def take_line(self) -> Tally:
        """Return the tally for a log line and begin the next one."""
        line, self.line = self.line, Tally()
        return line

    def state(self) -> dict[str, Any]:
        """Return the tallies and metrics that outlive this process; the same on all ranks after an exchange."""
        return {"line": vars(self.line), "epoch": vars(self.epoch), "metrics": vars(self.metrics)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what `state` returned."""
        self.line, self.epoch = Tally(**state["line"]), Tally(**state["epoch"])
        self.metrics = Metrics(**state["metrics"])

    def due(self, step: int) -> bool:
        """Return whether the exchange of about once per second falls on ``step``."""
        return step >= self._next_step

    def exchange(self, epoch: int, step: int) -> Tally:
        """Tell the other ranks how it went, learn how they fared, and return the sum. Collective.

        Raises:
            FloatingPointError: on every rank, if a rank's loss was not finite.
        """
        rows = self._gather()
        self._raise_if_not_finite(rows, epoch)
        self.stopping = self.stopping or bool(rows["stop"].any())
        tally = Tally(
            loss_sum=rows["loss_sum"].sum().item(),
            num_samples=rows["num_samples"].sum().item(),
            seconds=rows["seconds"].max().item(),
            blocked_seconds=rows["blocked_seconds"].mean().item(),
        )
        for total in (self.line, self.epoch, self.run):
            total.add(tally)
        self._plan(step, tally.seconds)
        return tally

    def _gather(self) -> dict[str, Tensor]:
        """Return each rank's values, by name, and start anew."""
        values = {
            "loss_sum": self._loss_sum.item(),
            "num_samples": self._num_samples,
            "first_bad_step": self._first_bad_step.item(),
            "stop": self.stop_signal.received,
            # After the two .item() above, which wait for the device.
            "seconds": time.perf_counter() - self._since,
            "blocked_seconds": self._comm.traffic.blocked_seconds - self._blocked_since,
        }
        self.restart_clock()
        self._loss_sum.zero_()
        self._num_samples = 0
        row = torch.tensor(list(values.values()), dtype=torch.float64, device=self._comm.device_type)
        rows = row.new_empty((self._comm.world_size, len(values)))
        self._comm.all_gather(rows, row)
        return dict(zip(values, rows.cpu().unbind(dim=1), strict=True))

    def _raise_if_not_finite(self, rows: dict[str, Tensor], epoch: int) -> None:
        step, rank = (value.item() for value in rows["first_bad_step"].min(dim=0))
        if math.isfinite(step):
            raise FloatingPointError(
                f"{self._comm.who('Engine.fit')}: the loss of rank {rank} is not finite since epoch {epoch}, "
                f"step {step:.0f}; lower the learning rate, clip gradients, or look for bad samples there"
            )

    def _plan(self, step: int, seconds: float) -> None:
        num_steps = step - self.last_step
        steps_per_s = num_steps / max(seconds, 1e-9)
        # At most twice as far as the last time, since the first steps say little about the next ones.
        ahead = min(int(SECONDS_BETWEEN_EXCHANGES * steps_per_s), 2 * num_steps)
        self.last_step, self._next_step = step, step + max(ahead, 1)
