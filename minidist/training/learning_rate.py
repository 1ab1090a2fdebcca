"""When the learning rate changes: after each optimizer step, or after an epoch where a scheduler wants its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from minidist.training.metrics import Metrics

Scheduler = LRScheduler


class LearningRate:
    """Steps a scheduler when it is due.

    Args:
        scheduler: None leaves the learning rate alone. ReduceLROnPlateau and its kind are stepped once per epoch, with
            the mean loss of the evaluation, which is the same on all ranks; all others once per optimizer step.
        optimizer: whose learning rate it is.

    Raises:
        ValueError: the optimizer or the scheduler cannot be stepped like that.
    """

    def __init__(self, scheduler: Scheduler | None, optimizer: Optimizer) -> None:
        _ensure_steps_alone(optimizer)
        self._scheduler = scheduler
        self._by_loss = isinstance(scheduler, ReduceLROnPlateau)
        if scheduler is not None and not self._by_loss and (needs := _needed(type(scheduler).step)):
            raise ValueError(
                f"Engine: {_name(scheduler)}.step needs {', '.join(needs)}, which the engine does not know; derive it "
                "from ReduceLROnPlateau to be given the loss of each evaluation, or step it between calls of fit"
            )

    def ensure_evaluated(self, eval_loader: Iterable[Any] | None) -> None:
        """Raise ValueError where the scheduler wants a loss that nobody measures."""
        if self._by_loss and eval_loader is None:
            raise ValueError(
                f"Engine.fit: {_name(self._scheduler)} is stepped with the loss of each evaluation, and there is no "
                "eval_loader; give one, or choose a scheduler that counts steps"
            )

    def step(self) -> None:
        """Note an optimizer step."""
        if self._scheduler is not None and not self._by_loss:
            self._scheduler.step()

    def end_epoch(self, metrics: Metrics) -> None:
        """Note the evaluation after an epoch."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(metrics.loss)


def _ensure_steps_alone(optimizer: Optimizer) -> None:
    if needs := _needed(type(optimizer).step):
        raise ValueError(
            f"Engine: {_name(optimizer)}.step needs a {needs[0]}, to compute the loss several times within one step; "
            "the engine computes it once: choose SGD, AdamW or another one without"
        )


def _needed(step: Callable[..., Any]) -> list[str]:
    """Return the arguments, beside self, that have to be given."""
    _, *parameters = inspect.signature(step).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _name(part: object) -> str:
    return type(part).__name__
