"""Trains a contender on virtual ranks, and keeps its loss by samples, by bytes, and by seconds on several networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from backends.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from backends.thread import spawn_threads
from backends.virtual import VirtualCommunicator
from experiments.tasks.data import Data
from experiments.tasks.datasets import Batch, loader
from minidist.analysis.network import Network
from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.gradients.hooks import Hook
from minidist.methods import Method
from minidist.training.metrics import accuracy

Floats = NDArray[np.float64]
RINGS = {"all_reduce": ring_all_reduce, "reduce_scatter": ring_reduce_scatter, "all_gather": ring_all_gather}
NUM_TEST_SAMPLES = 256


@dataclass(frozen=True)
class Task:
    """What is learned, alike for all contenders.

    Attributes:
        name: of it.
        data: the samples.
        module: the model as it begins; every rank trains a copy.
        batch_size: samples per rank and step.
        steps: how many.
        warmup: those over which the learning rate rises.
        test_every: steps between two tests, of which the last step is always one.
    """

    name: str
    data: Data
    module: nn.Module
    batch_size: int
    steps: int
    warmup: int
    test_every: int


@dataclass(frozen=True)
class Contender:
    """Who learns it.

    Attributes:
        name: of it.
        hook: makes what averages a rank's gradients.
        method: makes what decides when, and what else replicas exchange.
        optimizer: makes that of a replica.
    """

    name: str
    hook: Callable[[], Hook]
    method: Callable[[], Method]
    optimizer: Callable[[DistributedDataParallel], Optimizer]


@dataclass(frozen=True)
class Trial:
    """How one contender did with one seed, at each test.

    What is tested is the model that all ranks stand for at that moment, as if training ended there: replicas that learn
    apart may each be better, or worse, than what they come to together. A test takes no virtual time, and no bytes.

    Attributes:
        steps: that were done.
        losses, accuracies: on the test data.
        sent: bytes that a rank has sent, the mean over the ranks.
        seconds: when the last rank was there, by (test, network).
        exposed: seconds of a step in which a rank waited, by network; the mean over ranks and steps.
    """

    steps: Floats
    losses: Floats
    accuracies: Floats
    sent: Floats
    seconds: Floats
    exposed: Floats

    def seconds_to(self, target: float) -> Floats | None:
        """Return, by network, when the loss is first at most ``target``; None if it never is.

        Between two tests it is taken to fall evenly.
        """
        reached = np.flatnonzero(self.losses <= target)
        if not len(reached):
            return None
        index = reached[0]
        then: Floats = self.seconds[index]
        if index:
            ahead = (target - self.losses[index]) / (self.losses[index - 1] - self.losses[index])
            then = then - ahead * (then - self.seconds[index - 1])
        return then


def trial(
    task: Task, contender: Contender, networks: Mapping[str, Network], world_size: int, seed: int, num_at_once: int
) -> Trial:
    """Train one contender with one seed."""

    def job() -> _Run:
        torch.set_num_threads(1)
        with VirtualCommunicator(networks, RINGS, num_at_once=num_at_once) as comm, contender.method() as own:
            return _trained(task, contender, own, comm, seed)

    runs = spawn_threads(job, world_size)
    sums = np.sum([run.tests for run in runs], axis=0)  # over the ranks, each of which tests its part
    return Trial(
        np.array(runs[0].steps, dtype=np.float64),
        sums[:, 0] / sums[:, 2],
        sums[:, 1] / sums[:, 2],
        np.mean([run.sent for run in runs], axis=0),
        np.max([run.seconds for run in runs], axis=0),
        np.mean([run.waited for run in runs], axis=0) / task.steps,
    )


class _Run:
    """One rank's part of a trial: at each test the steps, the bytes, the seconds, and what the test came to."""

    def __init__(self, comm: VirtualCommunicator) -> None:
        self._comm = comm
        self._start, self._waited = comm.place.clock.times(), comm.place.clock.own.waited
        self.steps: list[int] = []
        self.sent: list[int] = []
        self.seconds: list[Floats] = []
        self.tests: list[tuple[float, float, int]] = []
        self.go_on()

    @property
    def waited(self) -> Floats:
        waited: Floats = self._comm.place.clock.own.waited - self._waited
        return waited

    def go_on(self) -> None:
        """Leave out what has been sent since the last note: it was for a test."""
        self._sent_before = self._comm.traffic.with_splits().bytes - sum(self.sent[-1:])

    def note(self, step: int) -> None:
        self.steps.append(step)
        self.sent.append(self._comm.traffic.with_splits().bytes - self._sent_before)
        self.seconds.append(self._comm.place.clock.times() - self._start)


def _trained(task: Task, contender: Contender, method: Method, comm: VirtualCommunicator, seed: int) -> _Run:
    """Train as one rank; `Engine` would do, if its roll calls sent nothing and it tested within an epoch."""
    replica = DistributedDataParallel(copy.deepcopy(task.module), method.replica_comm(comm), hook=contender.hook())
    optimizer = contender.optimizer(replica)
    method.begin(replica, optimizer, comm)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (task.warmup + 1)))
    loss_fn = nn.CrossEntropyLoss()
    run = _Run(comm)
    for step, (inputs, targets) in enumerate(_batches(task, comm, seed), start=1):
        optimizer.zero_grad()
        with nullcontext() if method.averages_gradients(step) else replica.no_sync():
            loss_fn(replica(inputs), targets).backward()
        optimizer.step()
        comm.clock.step_done()
        with comm.clock.between_steps():
            method.after_step(step)
        schedule.step()
        if step % task.test_every == 0 or step == task.steps:
            with comm.unwatched():
                run.note(step)
                with method.shown():
                    run.tests.append(_tested(task, replica.module, comm))
                run.go_on()
    return run


def _batches(task: Task, comm: Communicator, seed: int) -> Iterator[Batch]:
    """Yield one batch of this rank per step, epoch by epoch."""
    batches = loader(task.data.train, comm.rank, comm.world_size, task.batch_size, 0, True, seed)
    step = epoch = 0
    while step < task.steps:
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # it is the sampler that `loader` has made
        for batch in batches:
            yield batch
            step += 1
            if step == task.steps:
                return
        epoch += 1


@torch.no_grad()
def _tested(task: Task, module: nn.Module, comm: Communicator) -> tuple[float, float, int]:
    """Return the sums of the loss and of what is right over this rank's part of the samples, and how many these are."""
    module.eval()
    mine = range(comm.rank, min(len(task.data.test), NUM_TEST_SAMPLES), comm.world_size)
    inputs, targets = task.data.test.__getitems__(mine)
    outputs: Tensor = module(inputs)
    module.train()
    loss, right = nn.functional.cross_entropy(outputs, targets), accuracy(outputs, targets)
    return loss.item() * len(mine), right.item() * len(mine), len(mine)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if one of them is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
