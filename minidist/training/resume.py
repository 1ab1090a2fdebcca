"""What a checkpoint holds of a training, and how a training goes on from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from minidist.compression.compressor import Compressor
from minidist.contract.checks import spell
from minidist.launch import counted_ranks
from minidist.methods.method import Method
from minidist.sharded import ShardedOptimizer
from minidist.training.checkpoint import Checkpoints, Signature, State
from minidist.training.learning_rate import Scheduler
from minidist.training.progress import Position
from minidist.training.tally import Tallies

log = logging.getLogger(__name__)


@dataclass
class Training:
    """All of a training that outlives its process.

    The model's buffers are kept per rank besides, since they may differ, as do the random states in the position.
    The state of a `Compressor` is kept, per rank; that of any other hook is not. Where the method lets replicas differ,
    each rank's own is kept besides the one that it shows.

    On another number of ranks it goes on like this: parameters, optimizer and schedule as they were, which count steps
    and not samples; buffers of rank 0; random numbers of the ranks that there were; what is left of the epoch shared
    out among all, by as many samples per rank and batch as before; a hook without what it held back; and a method from
    the model that it showed.
    """

    module: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None
    position: Position
    tallies: Tallies
    method: Method
    hook: Any = None

    def signature(self) -> Signature:
        """Return what a checkpoint has to agree with to be one of this training."""
        kinds = {"the optimizer": _kind(self.optimizer), "the scheduler": _kind(self.scheduler)}
        if isinstance(self.hook, Compressor):
            kinds["the hook"] = self.hook.describe()
        if settings := self.method.describe():
            kinds["the method"] = settings
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return kinds | {name: f"{spell(t.dtype)}{list(t.shape)}" for name, t in named}

    def state(self) -> State:
        """Return where it stands; what ranks share is taken from rank 0. Collective."""
        shared = {
            "model": self.method.shared_model(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "status": self.tallies.state(),
        }
        # On the CPU, since another rank's GPU may not exist where rank 0 unpickles.
        buffers = {name: buffer.cpu() for name, buffer in self.module.named_buffers()}
        local = {"position": self.position.state(), "buffers": buffers}
        if isinstance(self.hook, Compressor):
            local["hook"] = self.hook.state_dict()
        if own := self.method.state_dict():
            local["method"] = own
        return State(self.position.step, self.signature(), shared, local)

    def restore(self, state: State) -> None:
        """Go to where `state` was called."""
        self.module.load_state_dict(state.shared["model"])
        changed = state.ranks_before > 0
        buffers = (state.first if changed else state.local)["buffers"]
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])  # rank 0's came with the model, but for those that are not persistent
        self.optimizer.load_state_dict(state.shared["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state.shared["scheduler"])
        if "hook" in state.local and not changed:
            self.hook.load_state_dict(state.local["hook"])
        if "method" in state.local and not changed:
            self.method.load_state_dict(state.local["method"])
        else:
            self.method.begin_anew()
        self.tallies.restore(state.shared["status"])
        own = state.local or state.first
        # Last, as what came before may draw random numbers.
        self.position.restore(own["position"], state.ranks_before, with_random=bool(state.local))


def begin(training: Training, checkpoints: Checkpoints | None) -> None:
    """Begin to train: from the newest checkpoint, from the start, or from where this process stopped. Collective.

    Raises:
        CheckpointError: an earlier run's checkpoints are there, and not to be resumed; they do not fit; or this
            training holds what no checkpoint can.
    """
    if checkpoints is None or training.position.step > 0:
        return
    if not checkpoints.resume:
        checkpoints.refuse_existing()
    elif (state := checkpoints.load(training.signature())) is not None:
        training.restore(state)
        for part in ("hook", "method"):
            if part in state.first and checkpoints.is_writer:
                log.warning("the %s begins anew: its state is of %s", part, counted_ranks(state.ranks_before))
    checkpoints.ensure_storable(training.state())


def _kind(part: Any) -> str:
    if isinstance(part, ShardedOptimizer):  # its state is that of whole parameters
        part = part.inner
    return "missing" if part is None else type(part).__name__
