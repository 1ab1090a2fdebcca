"""A loss that is not finite: from which step on, on which rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class FirstBadStep:
    """Remembers the first step of this rank whose loss was not finite, where the loss is, without waiting for it."""

    def __init__(self) -> None:
        self._step = torch.full((), math.inf, dtype=torch.float64)  # infinity: there was none

    def note(self, loss: Tensor, step: int) -> None:
        """Note the loss of ``step``; steps come in ascending order."""
        before = self._step.to(loss.device)
        # Not `if loss.isfinite()`, which would wait for a GPU in each step. The minimum keeps the first one.
        self._step = torch.where(loss.isfinite(), before, before.clamp(max=step))

    def read(self) -> float:
        """Return the step, infinity for none; waits for the device."""
        return self._step.item()


def ensure_finite(first_bad_steps: Tensor, epoch: int, who: str) -> None:
    """Raise FloatingPointError if a rank has had a bad step.

    Args:
        first_bad_steps: of each rank, as `FirstBadStep.read` returned it.
        epoch: for the message.
        who: this rank, for the message.
    """
    step, rank = (value.item() for value in first_bad_steps.min(dim=0))
    if math.isfinite(step):
        raise FloatingPointError(
            f"{who}: the loss of rank {rank} is not finite since epoch {epoch}, "
            f"step {step:.0f}; lower the learning rate, clip gradients, or look for bad samples there"
        )
