"""What methods have in common whose replicas take steps of their own, and differ in between."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from minidist.communicator import Communicator
from minidist.ddp import DistributedDataParallel
from minidist.errors import ConfigError
from minidist.gradients.replicas import SharedBuffers, make_replicas
from minidist.methods.method import Method
from minidist.methods.pieces import Piece, make_pieces, trained
from minidist.sharded import ShardedOptimizer


class LocalMethod(Method):
    """Each worker trains a replica of its own, from the same values on, with an optimizer of its own.

    A resume goes on to the same bits: parameters, the inner optimizer and what the method keeps are saved per rank, and
    with them the model that is shown. On another number of ranks it goes on from that model, with the optimizer of
    rank 0, in a new round. Buffers are each rank's own; what is shown has those of rank 0.

    Args:
        num_fragments: how many parts the parameters are exchanged in.
        ranks_per_worker: ranks that average their gradients in every step, neighbours by rank.

    Attributes:
        comm: the ranks of the other workers that have the same share as this one, and this one.
        pieces: the parameters, in the order in which they are exchanged.
    """

    comm: Communicator

    def __init__(self, num_fragments: int = 1, ranks_per_worker: int = 1) -> None:
        self.num_fragments = num_fragments
        self.ranks_per_worker = ranks_per_worker
        for name, value in (("num_fragments", num_fragments), ("ranks_per_worker", ranks_per_worker)):
            ensure_count(type(self).__name__, name, value, 1)
        self.pieces: list[Piece] = []
        self._worker: Communicator | None = None  # None: this rank alone
        self._parts: list[Communicator] = []
        self._own: list[Tensor] | None = None

    def complaint(self, num_ranks: int) -> str | None:
        if num_ranks % self.ranks_per_worker:
            return (
                f"ranks_per_worker is {self.ranks_per_worker}, which does not divide the number of ranks, {num_ranks}"
            )
        return None

    def misfit(self, module: nn.Module) -> str | None:
        """Return why it cannot do with a model, which may lie on the device meta; None if it can."""
        num_parameters = len(trained(module))
        if self.num_fragments <= num_parameters:
            return None
        return (
            f"num_fragments is {self.num_fragments}, and there are {num_parameters} parameters to share out among "
            "them; use fewer"
        )

    @property
    def uses_hook(self) -> bool:
        return self.ranks_per_worker > 1

    @final
    def replica_comm(self, comm: Communicator) -> Communicator:
        self._ensure_can(comm)
        if self.ranks_per_worker == 1:
            return comm  # over which it averages nothing
        self._worker = self._part(comm, comm.rank // self.ranks_per_worker)
        return self._worker

    @final
    def begin(self, replica: DistributedDataParallel, optimizer: Optimizer, comm: Communicator) -> None:
        self._ensure_can(comm)
        self._ensure_fits(replica, optimizer, comm)
        self._module, self._optimizer = replica.module, optimizer
        self._buffers = SharedBuffers(comm, self._module) if replica.broadcast_buffers else None
        arguments = replica.bucket_cap_mb, replica.broadcast_buffers, replica.find_unused_parameters
        make_replicas(comm, self._module, arguments, DistributedDataParallel)
        self.comm = comm if self._worker is None else self._part(comm, self._worker.rank)
        self.pieces = make_pieces(trained(self._module), self.num_fragments, self._worker)
        self.begin_anew()

    @final
    def close(self) -> None:
        for part in self._parts:
            part.close()

    @final
    def abort(self, reason: str) -> None:
        for part in self._parts:
            part.abort(reason)

    def averages_gradients(self, step: int) -> bool:
        return self.ranks_per_worker > 1

    @final
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self._ensure_unchanged()
        self._exchange(step)

    @final
    @torch.no_grad()
    def show(self) -> None:
        if self._own is None:
            self._own = [tensor.clone() for tensor in self._tensors()]
            self._write_shared()
            if self._buffers is not None:
                self._buffers.send(0)

    @final
    @torch.no_grad()
    def hide(self) -> None:
        if self._own is not None:
            torch._foreach_copy_(self._tensors(), self._own)
            self._own = None

    @property
    def is_shown(self) -> bool:
        return self._own is not None

    @final
    def shared_model(self) -> dict[str, Any]:
        with self.shown():
            return copy.deepcopy(self._module.state_dict())

    @final
    def state_dict(self) -> dict[str, Any]:
        own = {
            "parameters": dict(trained(self._module)),
            "optimizer": self._optimizer.state_dict(),
            "method": self._state(),
        }
        # Another rank's GPU may not exist where rank 0 unpickles; and training goes on in what is not copied.
        return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), own)  # type: ignore[no-any-return]

    @final
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, parameter in trained(self._module).items():
            parameter.copy_(state_dict["parameters"][name])
        self._optimizer.load_state_dict(copy.deepcopy(state_dict["optimizer"]))
        self._load(state_dict["method"])

    @abstractmethod
    def _exchange(self, step: int) -> None:
        """Exchange what is due after a step."""

    @abstractmethod
    def _write_shared(self) -> None:
        """Write into the parameters what all ranks stand for, the same bits everywhere."""

    def _state(self) -> dict[str, Any]:
        """Return what is kept besides the parameters and the inner optimizer."""
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        """Go on from what `_state` returned; the parameters are those of then."""
        return

    def _part(self, comm: Communicator, color: int) -> Communicator:
        part = comm.split(color)
        assert part is not None  # every rank has a color
        self._parts.append(part)
        return part

    def _ensure_can(self, comm: Communicator) -> None:
        if why := self.complaint(comm.world_size):
            raise ValueError(f"{comm.who(type(self).__name__)}: {why}")

    def _ensure_fits(self, replica: DistributedDataParallel, optimizer: Optimizer, comm: Communicator) -> None:
        who = comm.who(type(self).__name__)
        if self.pieces:
            raise RuntimeError(f"{who}: it serves another training and has its state; make each a method of its own")
        if isinstance(optimizer, ShardedOptimizer):
            raise ValueError(f"{who}: a ShardedOptimizer has the ranks step one model together; use a plain optimizer")
        expected = comm if self.ranks_per_worker == 1 else self._worker  # None if nobody has asked for it
        if replica.comm is not expected:
            raise ValueError(
                f"{who}: the model is wrapped over {replica.comm}; wrap it over replica_comm(comm) of this method"
            )
        if why := self.misfit(replica.module):
            raise ConfigError(f"{who}: {why}")

    def _ensure_unchanged(self) -> None:
        known = {id(parameter) for piece in self.pieces for parameter in piece.named.values()}
        if known != {id(parameter) for parameter in trained(self._module).values()}:
            raise RuntimeError(
                f"{self.comm.who(type(self).__name__)}: parameters were added, replaced, frozen or unfrozen since "
                "training began, and replicas would drift apart; change the module before you wrap it"
            )

    def _tensors(self) -> list[Tensor]:
        return [*(p for piece in self.pieces for p in piece.named.values()), *self._module.buffers()]


def ensure_count(method: str, name: str, value: int, least: int) -> None:
    """Raise ValueError if a setting is too small, or no whole number, as it may be where it comes from a file."""
    if not isinstance(value, int):
        raise ValueError(f"{method}: {name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{method}: {name} must be at least {least}, got {value}")
