"""Trains one method on virtual ranks, and keeps its loss by samples, by bytes, and by seconds on several networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from minidist.training.metrics import accuracy

Floats = NDArray[np.float64]
RINGS = {"all_reduce": ring_all_reduce, "reduce_scatter": ring_reduce_scatter, "all_gather": ring_all_gather}
NUM_TEST_SAMPLES = 512


@dataclass(frozen=True)
class Task:
    """What is learned, alike for all methods.

    Attributes:
        name: of it.
        data: the samples.
        module: the model as it begins; every rank trains a copy.
        optimizer: makes that of a replica.
        batch_size: samples per rank and step.
        steps: how many.
        warmup: those over which the learning rate rises.
    """

    name: str
    data: Data
    module: nn.Module
    optimizer: Callable[[DistributedDataParallel], Optimizer]
    batch_size: int
    steps: int
    warmup: int


@dataclass(frozen=True)
class Trial:
    """How one method did with one seed.

    Attributes:
        losses: of each step, the mean over the ranks.
        sent: bytes that a rank has sent by the end of each step, the mean over the ranks.
        seconds: when the last rank has ended each step, by (step, network).
        exposed: seconds of a step in which a rank waited, by network; the mean over ranks and steps.
        test_loss, test_accuracy: of rank 0's model at the end.
    """

    losses: Floats
    sent: Floats
    seconds: Floats
    exposed: Floats
    test_loss: float
    test_accuracy: float

    def smoothed(self, window: int) -> Floats:
        """Return for each step the mean loss of the ``window`` steps up to it, of fewer at the start."""
        sums = np.cumsum(np.concatenate([[0.0], self.losses]))
        ends = np.arange(1, len(self.losses) + 1)
        begins = np.maximum(ends - window, 0)
        smooth: Floats = (sums[ends] - sums[begins]) / (ends - begins)
        return smooth

    def seconds_to(self, target: float, window: int) -> Floats | None:
        """Return, by network, when the smoothed loss is first at most ``target``; None if it never is."""
        reached = np.flatnonzero(self.smoothed(window) <= target)
        if not len(reached):
            return None
        then: Floats = self.seconds[reached[0]]
        return then


def trial(
    task: Task,
    hook: Callable[[], Hook],
    networks: Mapping[str, Network],
    world_size: int,
    seed: int,
    num_at_once: int,
) -> Trial:
    """Train one method; ``hook()`` makes that of a rank."""

    def job() -> tuple[list[float], list[int], list[Floats], Floats, tuple[float, float] | None]:
        torch.set_num_threads(1)
        with VirtualCommunicator(networks, RINGS, num_at_once=num_at_once) as comm:
            return _trained(task, hook(), comm, seed)

    losses, sent, seconds, waited, tests = zip(*spawn_threads(job, world_size), strict=True)
    assert tests[0] is not None  # rank 0 is the one that tests
    exposed: Floats = np.mean(waited, axis=0) / task.steps
    return Trial(np.mean(losses, axis=0), np.mean(sent, axis=0), np.max(seconds, axis=0), exposed, *tests[0])


def _trained(
    task: Task, hook: Hook, comm: VirtualCommunicator, seed: int
) -> tuple[list[float], list[int], list[Floats], Floats, tuple[float, float] | None]:
    replica = DistributedDataParallel(copy.deepcopy(task.module), comm, hook=hook)
    optimizer = task.optimizer(replica)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (task.warmup + 1)))
    loss_fn = nn.CrossEntropyLoss()
    losses, sent, seconds = [], [], []
    start, sent_before, waited_before = comm.place.clock.times(), comm.traffic.bytes, comm.place.clock.own.waited
    for inputs, targets in _batches(task, comm, seed):
        optimizer.zero_grad()
        loss = loss_fn(replica(inputs), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        comm.clock.step_done()
        losses.append(loss.item())
        sent.append(comm.traffic.bytes - sent_before)
        seconds.append(comm.place.clock.times() - start)
    waited = comm.place.clock.own.waited - waited_before
    return losses, sent, seconds, waited, _tested(task, replica.module) if comm.rank == 0 else None


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
def _tested(task: Task, module: nn.Module) -> tuple[float, float]:
    module.eval()
    inputs, targets = task.data.test.__getitems__(range(min(len(task.data.test), NUM_TEST_SAMPLES)))
    outputs: Tensor = module(inputs)
    return nn.functional.cross_entropy(outputs, targets).item(), accuracy(outputs, targets).item()


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if one of them is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
