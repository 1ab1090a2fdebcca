"""How gradients become steps, besides the optimizer itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from minidist.sharded import ShardedOptimizer
from minidist.training.learning_rate import Scheduler


@dataclass(frozen=True)
class Optimisation:
    """What an engine does around each optimizer step.

    Attributes:
        scheduler: stepped once per optimizer step, not per epoch: ``StepLR(optimizer, 30)`` means 30 steps, and 30
            epochs are ``StepLR(optimizer, 30 * len(train_loader))``. ReduceLROnPlateau alone is stepped once per
            epoch, with the loss of its evaluation.
        accumulation_steps: batches per optimizer step, each with the same weight; the last step of an epoch
            may have fewer. Only the last batch of a step communicates.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        autocast_dtype: forward passes run in ``torch.autocast`` of this type; None leaves it off. float16
            is refused, since its gradients vanish without loss scaling.

    Raises:
        ValueError: one of them is out of range.
    """

    scheduler: Scheduler | None = None
    accumulation_steps: int = 1
    max_grad_norm: float | None = None
    autocast_dtype: torch.dtype | None = None

    def clip(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Clip the gradients of ``model``, wherever its ``optimizer`` has them; all ranks call it together."""
        if self.max_grad_norm is None:
            return
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.clip_grad_norm_(self.max_grad_norm)
        else:  # every rank has the same gradients by now, and hence the same norm
            nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)

    def __post_init__(self) -> None:
        if self.accumulation_steps < 1:
            raise ValueError(f"Optimisation: accumulation_steps must be at least 1, got {self.accumulation_steps}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"Optimisation: max_grad_norm must be greater than 0, got {self.max_grad_norm}; "
                "None leaves gradients alone"
            )
        if self.autocast_dtype is torch.float16:
            raise ValueError(
                "Optimisation: autocast_dtype float16 needs loss scaling, or small gradients vanish; use torch.bfloat16"
            )
