"""The outer step of DiLoCo and its kind: replicas move apart for a while, and where they meant to go is averaged.

::

    values   ----- inner steps on rank 0 ---->  parameters 0      pseudo-gradient 0 = values - parameters 0
    values   ----- inner steps on rank 1 ---->  parameters 1      pseudo-gradient 1 = values - parameters 1

    values  <-  outer SGD on the mean pseudo-gradient, the same on all ranks

The pseudo-gradients travel through a hook, as gradients do: whole, cast or compressed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from minidist.communicator import Communicator, Work
from minidist.compression.compressor import Compressor
from minidist.contract.work import DONE
from minidist.gradients.hooks import Hook
from minidist.methods.local import LocalMethod, ensure_count
from minidist.methods.pieces import Piece


class Outer:
    """What all workers agreed on last of a piece, and the optimizer that goes on from there.

    Args:
        piece: the parameters.
        comm: the workers.
        hook: how pseudo-gradients travel.
        lr, momentum: of the outer SGD, which is Nesterov's where there is momentum.

    Attributes:
        values: this rank's share of what was agreed on; bit-identical on all workers.
        in_flight: whether pseudo-gradients are on their way, or have come and are not used yet.
    """

    def __init__(self, piece: Piece, comm: Communicator, hook: Hook, lr: float, momentum: float) -> None:
        self.piece = piece
        self.values = nn.Parameter(piece.read().clone())
        self.in_flight = False
        self._comm = comm
        self._hook = hook
        self._bucket = piece.bucket(comm)
        self.values.grad = self._bucket.flat
        self._optimizer = torch.optim.SGD([self.values], lr, momentum, nesterov=momentum > 0)
        self._work: Work = DONE

    @torch.no_grad()
    def start(self) -> None:
        """Start to average the pseudo-gradients."""
        torch.sub(self.values, self.piece.read(), out=self._bucket.flat)
        self._bucket.flat.div_(self._comm.world_size)
        self._work = self._hook(self._bucket, self._comm)
        self.in_flight = True

    def settle(self) -> None:
        """Wait for what is on its way."""
        self._work.wait()

    def finish(self) -> Tensor:
        """Take the outer step along what was started; return the new values."""
        self.settle()
        self.in_flight = False
        self._optimizer.step()
        return self.values.detach()

    def state(self) -> dict[str, Any]:
        """Return the values, the momentum, and the mean pseudo-gradients that are not used yet."""
        self.settle()
        mean = self._bucket.flat if self.in_flight else None
        return {"values": self.values, "optimizer": self._optimizer.state_dict(), "mean": mean}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.values.copy_(state["values"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._work = DONE
        self.in_flight = state["mean"] is not None
        if self.in_flight:
            self._bucket.flat.copy_(state["mean"])


class OuterMethod(LocalMethod):
    """Workers that agree on outer values once in a period. What is shown are these, without the steps since.

    Args:
        period: inner steps between two outer ones (H).
        outer_lr, outer_momentum: of the outer SGD.
        hook: how pseudo-gradients travel; see `minidist.gradients.hooks`.
        num_fragments, ranks_per_worker: see `LocalMethod`.
    """

    def __init__(
        self,
        period: int,
        outer_lr: float,
        outer_momentum: float,
        hook: Hook,
        num_fragments: int = 1,
        ranks_per_worker: int = 1,
    ) -> None:
        super().__init__(num_fragments, ranks_per_worker)
        name = type(self).__name__
        ensure_count(name, "period", period, 1)
        if not 0 < outer_lr < math.inf:
            raise ValueError(f"{name}: outer_lr must be greater than 0 and finite, got {outer_lr}")
        if not 0 <= outer_momentum < 1:
            raise ValueError(f"{name}: outer_momentum must be at least 0 and below 1, got {outer_momentum}")
        self.period = period
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.hook = hook
        self.outers: list[Outer] = []

    def begin_anew(self) -> None:
        settings = self.comm, self.hook, self.outer_lr, self.outer_momentum
        self.outers = [Outer(piece, *settings) for piece in self.pieces]

    def _write_shared(self) -> None:
        for outer in self.outers:
            outer.settle()
            outer.piece.write(outer.values)

    def _state(self) -> dict[str, Any]:
        outers = [outer.state() for outer in self.outers]  # which waits for what the hook has still to do
        return {"outers": outers, "hook": self.hook.state_dict() if isinstance(self.hook, Compressor) else {}}

    def _load(self, state: dict[str, Any]) -> None:
        for outer, its in zip(self.outers, state["outers"], strict=True):
            outer.load(its)
        if isinstance(self.hook, Compressor):
            self.hook.load_state_dict(state["hook"])
