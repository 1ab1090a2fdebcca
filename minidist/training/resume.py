"""Everything that a resumed training needs, gathered from where it lives and put back there."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from minidist.contract.checks import spell
from minidist.training.checkpoint import Checkpoints, Signature, State
from minidist.training.progress import Position
from minidist.training.status import Status


class Resumption:
    """Saves a training to checkpoints and goes on from them; every method is collective.

    The model's buffers are kept per rank besides, since they may differ, as do the random states in the position.
    A hook's own state is not kept.

    Args:
        checkpoints: None to keep nothing.
        resume: go on from the newest one, if any; otherwise those of an earlier run are refused.
        module, optimizer, scheduler, position, status: the parts of the training.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        resume: bool,
        module: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        position: Position,
        status: Status,
    ) -> None:
        self._checkpoints, self._resume, self._module = checkpoints, resume, module
        self._optimizer, self._scheduler = optimizer, scheduler
        self._position, self._status = position, status

    def start(self) -> None:
        """Begin to train: from the newest checkpoint, from the start, or from where this process stopped."""
        if self._checkpoints is not None and self._position.step == 0:
            if not self._resume:
                self._checkpoints.refuse_existing()
            elif (state := self._checkpoints.load(self._signature())) is not None:
                self._restore(state)
            self._checkpoints.check(self._state())
        self._status.start(self._position.step)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be saved after ``step``."""
        return self._checkpoints is not None and self._checkpoints.due(step)

    def save(self) -> None:
        """Save where training stands, right after a status exchange."""
        if self._checkpoints is not None:
            self._checkpoints.save(self._state())
            self._status.restart_clock()

    def _state(self) -> State:
        shared = {
            "model": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "status": self._status.state(),
        }
        # On the CPU, since another rank's GPU may not exist where rank 0 unpickles.
        buffers = {name: buffer.cpu() for name, buffer in self._module.named_buffers()}
        local = {"position": self._position.state(), "buffers": buffers}
        return State(self._position.step, self._signature(), shared, local)

    def _restore(self, state: State) -> None:
        self._module.load_state_dict(state.shared["model"])
        for name, buffer in self._module.named_buffers():
            buffer.copy_(state.local["buffers"][name])
        self._optimizer.load_state_dict(state.shared["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state.shared["scheduler"])
        self._status.restore(state.shared["status"])
        self._position.restore(state.local["position"])

    def _signature(self) -> Signature:
        kinds = {"the optimizer": _kind(self._optimizer), "the scheduler": _kind(self._scheduler)}
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        return kinds | {name: f"{spell(t.dtype)}{list(t.shape)}" for name, t in named}


def _kind(part: Any) -> str:
    return "missing" if part is None else type(part).__name__
