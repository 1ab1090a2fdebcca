"""A communicator as somebody outside of this repository would write it: `_isend`, `_irecv`, nothing else.

Messages are entries of the store that torchrun keeps for its ranks: slow, but twenty lines that matter.
Who fails says so in the store; who waits looks there twice a second.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import DistError, PrefixStore, TCPStore

from backends.scheduled import ScheduledCommunicator
from minidist.communicator import ReduceOp, Work
from minidist.contract.work import DONE
from minidist.errors import CommTimeoutError

_numbers = itertools.count()  # the k-th communicator of a process meets the k-th of the others
LOOK_S = 0.5
LEFT = "it left the group"


class StoreCommunicator(ScheduledCommunicator):
    """Ranks of torchrun that talk through its store."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        super().__init__(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = PrefixStore(f"outside{next(_numbers)}", TCPStore(host, port, is_master=False))
        self._num_sent: dict[str, int] = defaultdict(int)
        self._num_received: dict[str, int] = defaultdict(int)
        self._lost_ranks: dict[int, str] = {}

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        route = f"{self.rank}-{dst}-{tag}"
        self.store.set(f"{route}-{self._num_sent[route]}", tensor.view(-1).view(torch.uint8).numpy().tobytes())
        self._num_sent[route] += 1
        return DONE

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        route = f"{src}-{self.rank}-{tag}"
        self._num_received[route] += 1
        return _Receive(self, tensor, src, f"{route}-{self._num_received[route] - 1}", timeout_s)

    def is_hopeless(self, src: int) -> bool:
        """Whether it is to wait for ``src``: a rank failed, the first one is the cause, or that one has left."""
        for number in range(1, self.store.add("num_gone", 0) + 1):
            rank, why = self.store.get(f"gone-{number}").decode().split(" ", 1)
            if why != LEFT or int(rank) == src:
                self._lost_ranks[int(rank)] = why
                return True
        return False

    def _close(self) -> None:
        self._abort(LEFT)

    def _abort(self, reason: str) -> None:
        number = self.store.add("num_gone", 1)
        self.store.set(f"gone-{number}", f"{self.rank} {reason}")

    def _gone(self) -> Mapping[int, str]:
        return self._lost_ranks


class _Receive(Work):
    def __init__(self, comm: StoreCommunicator, tensor: Tensor, src: int, key: str, timeout_s: float) -> None:
        self._comm, self._tensor, self._src, self._key, self._timeout_s = comm, tensor, src, key, timeout_s
        self._deadline, self._is_taken = time.monotonic() + timeout_s, False

    def wait(self) -> None:
        while not self._is_taken:
            left = self._deadline - time.monotonic()
            try:
                self._comm.store.wait([self._key], timedelta(seconds=max(min(left, LOOK_S), 0.001)))
            except DistError as error:
                if self._comm.is_hopeless(self._src):
                    raise self._comm._lost() from error
                if left <= 0:
                    raise CommTimeoutError(f"no message within {self._timeout_s:g} s") from error
            else:
                self._take()

    def _take(self) -> None:
        data = bytearray(self._comm.store.get(self._key))
        self._comm.store.delete_key(self._key)
        self._tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
        self._is_taken = True

    def is_done(self) -> bool:
        return self._is_taken or self._comm.store.check([self._key]) or self._comm.is_hopeless(self._src)

    def exception(self) -> BaseException | None:
        return None


class ForgetfulCommunicator(StoreCommunicator):
    """One that the suite has to refuse: what it reduces never leaves the rank."""

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        return
