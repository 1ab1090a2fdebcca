"""Exact metrics of an evaluation, however its samples are spread over the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidist.communicator import Communicator


@dataclass(frozen=True)
class Metrics:
    """An evaluation, over all ranks.

    Attributes:
        loss: mean loss per sample; nan without samples.
        accuracy: share of right classes, 0 to 1; nan where targets are no classes.
        num_samples: samples that were evaluated.
    """

    loss: float
    accuracy: float
    num_samples: int


class MetricSums:
    """Sums of this rank's batches, in float64, kept on the device until the end."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, outputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add a batch; ``loss`` is its mean."""
        share = torch.stack([loss.double(), accuracy(outputs, targets), self._sums.new_ones(())])
        self._sums += len(targets) * share

    def over_all_ranks(self, comm: Communicator) -> Metrics:
        """Return the metrics of all batches of all ranks. Collective."""
        sums = self._sums.to(comm.device_type)
        comm.all_reduce(sums)
        loss_sum, num_right, num_samples = sums.tolist()
        if not num_samples:
            return Metrics(math.nan, math.nan, 0)
        return Metrics(loss_sum / num_samples, num_right / num_samples, int(num_samples))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of targets whose class has the largest output, a float64 scalar.

    Classes are the second dimension of ``outputs``, (N, C) or (N, C, ...), and integers in ``targets``, (N) or
    (N, ...); the share is nan for anything else.
    """
    has_classes = not (targets.is_floating_point() or targets.is_complex())
    if not has_classes or outputs.dim() < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return torch.full((), math.nan, dtype=torch.float64, device=outputs.device)
    return (outputs.argmax(dim=1) == targets).double().mean()
