"""What a training step takes on more ranks than there are: from one step that was measured, and a model of the network.

A bucket can start when its last gradient is there and the bucket before it has been reduced; the step ends when
backward and the last bucket have, and the optimizer has run (Li et al., "PyTorch Distributed", 2020).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from minidist.gradients.buckets import FIRST_BUCKET_BYTES, assign

MEGABYTE = 2**20


@dataclass(frozen=True)
class Profile:
    """A training step without communication.

    Attributes:
        nbytes: of each gradient, in the order in which buckets take them.
        ready: seconds from the start of the step until each of them is there.
        backward: seconds from the start of the step until backward has ended.
        step: seconds of the whole step.
    """

    nbytes: Sequence[int]
    ready: Sequence[float]
    backward: float
    step: float

    def seconds(self, bucket_cap_mb: float, cost: Callable[[float], float]) -> float:
        """Return what a step takes whose buckets take ``cost(nbytes)`` seconds each to reduce."""
        cap = int(bucket_cap_mb * MEGABYTE)
        free = 0.0
        for bucket in assign(self.nbytes, [0] * len(self.nbytes), cap, FIRST_BUCKET_BYTES):
            ready = max(self.ready[index] for index in bucket)
            free = max(free, ready) + cost(sum(self.nbytes[index] for index in bucket))
        return self.step + max(free - self.backward, 0.0)


def profile(module: nn.Module, shape: Sequence[int], batch_size: int, iterations: int = 5) -> Profile:
    """Measure steps of ``module`` on one random batch of 10 classes; the medians count."""
    inputs = torch.randn(batch_size, *shape)
    targets = torch.randint(10, (batch_size,))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, fused=True)
    loss_fn = nn.CrossEntropyLoss()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad][::-1]
    index: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(parameters)}
    ready = [[0.0] * len(parameters) for _ in range(iterations)]
    backward = [0.0] * iterations
    step = [0.0] * iterations
    # Iterations -2 and -1 warm up: they write where the last two will write again.
    for iteration in range(-2, iterations):
        started = time.perf_counter()

        def note(parameter: Tensor, started: float = started, iteration: int = iteration) -> None:
            ready[iteration][index[parameter]] = time.perf_counter() - started

        hooks = [p.register_post_accumulate_grad_hook(note) for p in parameters]  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss_fn(module(inputs), targets).backward()
        backward[iteration] = time.perf_counter() - started
        optimizer.step()
        step[iteration] = time.perf_counter() - started
        for hook in hooks:
            hook.remove()
    medians = np.median(ready, axis=0).tolist()
    return Profile([p.nbytes for p in parameters], medians, statistics.median(backward), statistics.median(step))
