"""Faults on purpose, around any communicator: ranks that are slow, messages that go wrong, ranks that end.

::

    torchrun --nproc-per-node=4 experiments/mnist.py comm=delayed comm/transport=gloo comm.message_s=0.01
    torchrun --nproc-per-node=4 experiments/mnist.py comm=killed comm/transport=shm comm.rank=2 comm.operation=100

What a training does then can be looked at, and tested, before it happens. What is random is drawn from a seed and the
rank, so that it happens again. An operation is a collective of some elements, or a message that this rank starts or
receives, counted from 1; what a split makes is another communicator, without faults.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.executor.executor import Executor
from backends.schedules import DEFAULTS
from backends.wrapper import Wrapper
from minidist.communicator import Communicator, Work
from minidist.contract.carriers import bytes_of
from minidist.contract.inner import Inner
from minidist.contract.work import DONE


class _OnOneRank(Wrapper):
    """A communicator that goes wrong on one rank, or on all of them (None)."""

    def __init__(self, transport: Communicator, rank: int | None, timeout_s: float | None) -> None:
        if rank is not None and not 0 <= rank < transport.world_size:
            who = f"{type(self).__name__}: rank must be 0 to {transport.world_size - 1}"
            raise ValueError(f"{who}, or null for all of them, got {rank}")
        super().__init__(transport, timeout_s)
        self.transport = transport
        self._is_hit = rank is None or rank == transport.rank


class DelayedCommunicator(_OnOneRank):
    """Another communicator, slower at random moments; see `Wrapper`.

    A delay is of an exponential distribution, so that most are short and some are long.

    Args:
        transport: what does the work.
        operation_s: the mean delay before each operation but a receive.
        message_s: the mean delay before each message of this rank besides; those of a collective count if it runs as a
            schedule over this communicator.
        rank: which rank; None for all.
        seed: of the delays, with the rank.
        timeout_s: None for the transport's.

    Raises:
        ValueError: a delay is negative, or there is no such rank.
    """

    def __init__(
        self,
        transport: Communicator,
        operation_s: float = 0.0,
        message_s: float = 0.0,
        rank: int | None = None,
        seed: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        if operation_s < 0 or message_s < 0:
            raise ValueError(f"DelayedCommunicator: delays must be at least 0 s, got {operation_s=}, {message_s=}")
        super().__init__(transport, rank, timeout_s)
        self._operation_s, self._message_s = operation_s, message_s
        self._random = random.Random(f"{seed} {transport.rank}")

    def _collective(self, name: str) -> Callable[..., None]:
        run = super()._collective(name)

        def run_late(*args: Any) -> None:
            self._sleep(self._operation_s)
            run(*args)

        return run_late

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        self._sleep(self._operation_s + self._message_s)
        return super()._isend(tensor, dst, tag, timeout_s)

    def _sleep(self, mean_s: float) -> None:
        if self._is_hit and mean_s > 0:
            time.sleep(self._random.expovariate(1 / mean_s))


class _Once(_OnOneRank):
    """A communicator that goes wrong once, at something that it counts from 1."""

    def __init__(self, transport: Communicator, rank: int | None, number: int, timeout_s: float | None) -> None:
        super().__init__(transport, rank, timeout_s)
        self._left = number if self._is_hit else 0

    def _is_next(self) -> bool:
        """Count one more, and return whether it is the one."""
        self._left -= 1
        return self._left == 0


class LossyCommunicator(_Once):
    """Another communicator, one of whose messages goes wrong; see `Wrapper`.

    Collectives run as schedules over its messages, as the transport's own ones might not send any. What comes of it is
    the transport's: Gloo, for one, takes a message that was cut for a whole one, so that numbers are wrong.

    Args:
        transport: what moves the messages.
        fault: ``lost``: it does not leave; ``doubled``: it leaves twice; ``cut``: its second half is missing;
            ``flipped``: one of its bits is.
        message: which one, counted from 1 over those of this rank that carry data.
        rank: whose; None for one of each rank.
        seed: of the bit.
        timeout_s: None for the transport's.

    Raises:
        ValueError: there is no such fault, message or rank.
    """

    FAULTS = ("lost", "doubled", "cut", "flipped")

    def __init__(
        self,
        transport: Communicator,
        fault: str,
        message: int = 1,
        rank: int | None = 0,
        seed: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        if fault not in self.FAULTS:
            raise ValueError(f"LossyCommunicator: fault must be one of {', '.join(self.FAULTS)}, got {fault!r}")
        if message < 1:
            raise ValueError(f"LossyCommunicator: message must be at least 1, got {message}")
        super().__init__(transport, rank, message, timeout_s)
        self._fault = fault
        self._random = random.Random(f"{seed} {transport.rank}")
        self._executor = Executor(Inner(self), DEFAULTS, self._schedule_tag, 2**22, proves=False)

    def _collective(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = getattr(self._executor, name)
        return hook

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        send = super()._isend
        if not tensor.numel() or not self._is_next():
            return send(tensor, dst, tag, timeout_s)
        if self._fault == "lost":
            return DONE
        if self._fault == "doubled":
            send(tensor, dst, tag, timeout_s)
            return send(tensor, dst, tag, timeout_s)
        if self._fault == "cut":
            return send(tensor.view(-1)[: tensor.numel() // 2], dst, tag, timeout_s)
        wrong = tensor.clone()
        data = bytes_of(wrong).view(-1)
        bits = 1 if tensor.dtype is torch.bool else 8
        data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(bits)
        return send(wrong, dst, tag, timeout_s)


class KilledCommunicator(_Once):
    """Another communicator, one of whose ranks ends in the middle of a training; see `Wrapper`.

    Args:
        transport: what does the work.
        rank: which rank; None for all of them.
        operation: before which operation, counted from 1.
        how: ``raise``: an exception, RuntimeError; ``exit``: the process ends without a word, as ``os._exit(1)`` ends
            it; ``kill``: SIGKILL; ``stop``: SIGSTOP, which leaves a process that does nothing any more.
        timeout_s: None for the transport's.

    Raises:
        ValueError: there is no such rank, operation or end.
    """

    ENDS = ("raise", "exit", "kill", "stop")

    def __init__(
        self,
        transport: Communicator,
        rank: int | None = 0,
        operation: int = 1,
        how: str = "kill",
        timeout_s: float | None = None,
    ) -> None:
        if how not in self.ENDS:
            raise ValueError(f"KilledCommunicator: how must be one of {', '.join(self.ENDS)}, got {how!r}")
        if operation < 1:
            raise ValueError(f"KilledCommunicator: operation must be at least 1, got {operation}")
        super().__init__(transport, rank, operation, timeout_s)
        self._how = how
        self._operation = operation

    def _collective(self, name: str) -> Callable[..., None]:
        run = super()._collective(name)

        def run_or_end(*args: Any) -> None:
            self._count()
            run(*args)

        return run_or_end

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        self._count()
        return super()._isend(tensor, dst, tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        self._count()
        return super()._irecv(tensor, src, tag, timeout_s)

    def _count(self) -> None:
        if not self._is_next():
            return
        if self._how == "raise":
            raise RuntimeError(f"ended on purpose before operation {self._operation}")
        if self._how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL if self._how == "kill" else signal.SIGSTOP)
