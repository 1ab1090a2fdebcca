"""A training step to be measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.measuring.compare import Action


def step(model: nn.Module, optimizer: Optimizer, shape: Sequence[int], batch_size: int) -> Action:
    """Return a training step of ``model`` on one random batch."""
    inputs = torch.randn(batch_size, *shape)
    targets = torch.randint(10, (batch_size,))
    loss_fn = nn.CrossEntropyLoss()

    def run() -> None:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()

    return run
