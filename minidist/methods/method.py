"""What replicas exchange, and when: their gradients in every step, or something else, more rarely.

::

    engine                            a method
    backward of a step        <----   averages_gradients(step): whether it ends with the mean of the gradients
    optimizer.step()
    after_step(step)           ---->  exchanges what it has to
    evaluate, end of fit       ---->  show(): the module holds the one model that all ranks stand for
    back to training           ---->  hide(): and this rank's own again
    checkpoint                 ---->  shared_model(), state_dict()

A *worker* is the ranks that have one replica between them and average its gradients in every step; often one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, final

from torch.optim import Optimizer

from minidist.communicator import Communicator
from minidist.compression.compressor import described
from minidist.ddp import DistributedDataParallel


class Method(ABC):
    """Made of settings alone, before there are ranks; it then serves one training.

    All ranks call its methods together.
    """

    def describe(self) -> str:
        """Return the class and its settings, which a state that is loaded has to agree with; empty if there is none."""
        return described(self)

    def complaint(self, num_ranks: int) -> str | None:
        """Return why it cannot do with so many ranks, and what would; None if it can."""
        return None

    @property
    def uses_hook(self) -> bool:
        """Whether gradients are ever averaged, so that the hook of the wrapper has something to do."""
        return True

    def replica_comm(self, comm: Communicator) -> Communicator:
        """Return what the model has to be wrapped over: the ranks of this rank's worker."""
        return comm

    @abstractmethod
    def begin(self, replica: DistributedDataParallel, optimizer: Optimizer, comm: Communicator) -> None:
        """Serve a training.

        Args:
            replica: the model, wrapped over `replica_comm`.
            optimizer: of its parameters; the inner one, where there is another.
            comm: all ranks that train.

        Raises:
            ValueError: the model is wrapped over other ranks, or the method cannot do with what it is given.
            RuntimeError: it has served another training.
        """

    def close(self) -> None:
        """Close the communicators that it has made; closing twice is fine."""
        return

    def abort(self, reason: str) -> None:
        """Leave the communicators that it has made at once, and tell the ranks that wait there why."""
        return

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close it; or, after an error, do not wait for ranks that may wait for this one elsewhere."""
        if error is None:
            self.close()
        else:
            self.abort(f"{type(error).__name__}: {error}")

    @abstractmethod
    def averages_gradients(self, step: int) -> bool:
        """Return whether the backward pass of ``step``, the first is 1, averages gradients within the worker."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Exchange what is due after optimizer step ``step``."""

    @abstractmethod
    def show(self) -> None:
        """Put the model that all ranks stand for into the module, the same bits everywhere, and lay the own one by."""

    @abstractmethod
    def hide(self) -> None:
        """Put this rank's own model back; nothing if it is there. What was changed meanwhile is undone."""

    @property
    @abstractmethod
    def is_shown(self) -> bool:
        """Whether `show` was called, and `hide` was not."""

    @final
    @contextmanager
    def shown(self) -> Iterator[None]:
        """Have it shown inside."""
        if self.is_shown:
            yield
            return
        self.show()
        try:
            yield
        finally:
            self.hide()

    @abstractmethod
    def shared_model(self) -> dict[str, Any]:
        """Return the state dict of the model that all ranks stand for, for a checkpoint."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what is this rank's own, on the CPU; empty if there is nothing beside the model and its optimizer."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of the same rank, number of ranks, model and settings."""

    @abstractmethod
    def begin_anew(self) -> None:
        """Go on from the model as it is in the module, the same on all ranks, without a state."""


class EveryStep(Method):
    """The mean gradient in every step, on its way while backward goes on: `DistributedDataParallel` as it is."""

    def begin(self, replica: DistributedDataParallel, optimizer: Optimizer, comm: Communicator) -> None:
        if replica.comm.world_size != comm.world_size:
            raise ValueError(
                f"{comm.who('EveryStep')}: the model is wrapped over {replica.comm.world_size} of the "
                f"{comm.world_size} ranks, and the others would train apart; wrap it over the engine's communicator"
            )
        self._replica = replica

    def describe(self) -> str:
        return ""

    def averages_gradients(self, step: int) -> bool:
        return True

    def after_step(self, step: int) -> None:
        return

    def show(self) -> None:
        return

    def hide(self) -> None:
        return

    @property
    def is_shown(self) -> bool:
        return True

    def shared_model(self) -> dict[str, Any]:
        return self._replica.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return

    def begin_anew(self) -> None:
        return
