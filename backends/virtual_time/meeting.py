"""Where the ranks of one communicator meet: for each collective, and for each message."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from backends.virtual_time.clock import Times
from backends.virtual_time.costs import Costs
from backends.virtual_time.moves import MOVES
from minidist.collective import Run
from minidist.communicator import ReduceOp
from minidist.contract.checks import spell
from minidist.errors import CommError, MismatchError


@dataclass(frozen=True)
class Part:
    """What one rank brings to a collective.

    Attributes:
        run: which it is.
        op: of a reduction.
        tensors: what its hook was given.
        begins: when it begins.
    """

    run: Run
    op: ReduceOp
    tensors: Sequence[Tensor]
    begins: Times

    @property
    def nbytes(self) -> int:
        """The size of the larger tensor of the collective."""
        return self.numel * (self.run.world_size if self._has_blocks else 1) * self._itemsize

    @property
    def numel(self) -> int:
        """How many elements the tensor has, or a block where there are blocks; one for a barrier."""
        sizes = [tensor.numel() for tensor in self.tensors]
        if self.run.name == "all_to_all":
            return sizes[0] // self.run.world_size
        return min(sizes, default=1)

    @property
    def call(self) -> str:
        """It in words, the same on all ranks."""
        root = f" {self.run.collective.root} {self.run.root}" if self.run.collective.is_rooted else ""
        size = f" of {self.numel} {spell(self.tensors[0].dtype)}" if self.tensors else ""
        op = f" by {self.op.name}" if "reduce" in self.run.name else ""
        return f"{self.run.name}{size}{op}{root}"

    @property
    def _has_blocks(self) -> bool:
        return self.run.collective.has_tensor and self.run.name not in ("all_reduce", "reduce", "broadcast")

    @property
    def _itemsize(self) -> int:
        return self.tensors[0].element_size() if self.tensors else 0


@dataclass
class _Gathering:
    """One collective, for which ranks come together.

    Attributes:
        parts: what is there, by rank.
        ends: when each rank has finished, once all of it is done.
        error: why it cannot be done.
    """

    parts: dict[int, Part] = field(default_factory=dict)
    ends: Sequence[Times] = ()
    error: CommError | None = None


class Meeting:
    """What the ranks of one communicator share.

    Args:
        costs: what their operations take.
        num_ranks: how many they are.
        changed: notified of each collective that is done; and, by others, of each rank that goes.
    """

    def __init__(self, costs: Costs, num_ranks: int, changed: threading.Condition) -> None:
        self.costs = costs
        self._ranks = range(num_ranks)
        self._changed = changed
        self._num_joined = [0] * num_ranks
        self._open: dict[int, _Gathering] = defaultdict(_Gathering)
        self._num_split = [0] * num_ranks
        self._children: dict[int, list[Meeting]] = {}
        self._arrivals: dict[tuple[int, int, int], deque[tuple[Times, Times, Times]]] = defaultdict(deque)
        self._out = [np.zeros(1) for _ in self._ranks]  # by rank, until when its port is busy
        self._into = [np.zeros(1) for _ in self._ranks]

    def join(self, rank: int, part: Part, wait: Callable[[int], None]) -> Times:
        """Take part in the next collective of this rank, which the last one to come does; return when this rank ends.

        Args:
            rank: who comes.
            part: with what.
            wait: called with the lock, waits for a change, and raises if to wait for that rank is hopeless.

        Raises:
            MismatchError: on all ranks, if they mean different collectives.
        """
        with self._changed:
            number = self._num_joined[rank]
            self._num_joined[rank] += 1
            gathering = self._open[number]
            gathering.parts[rank] = part
            is_last = len(gathering.parts) == len(self._ranks)
        if is_last:
            self._finish(gathering)
            with self._changed:
                del self._open[number]
                self._changed.notify_all()
        else:
            self._await(gathering, rank, wait)
        if gathering.error is not None:
            raise type(gathering.error)(str(gathering.error))  # each rank adds to its own who it is
        return gathering.ends[rank]

    def _await(self, gathering: _Gathering, rank: int, wait: Callable[[int], None]) -> None:
        with self._changed:
            while not gathering.ends and gathering.error is None:
                missing = [other for other in self._ranks if other not in gathering.parts]
                try:
                    # With all there, one of them moves tensors of this rank at this moment: that ends soon, and well.
                    wait(missing[0]) if missing else self._changed.wait()
                except BaseException:
                    gathering.parts.pop(rank)  # so that nobody moves what this rank has given up
                    raise

    def _finish(self, gathering: _Gathering) -> None:
        parts = [gathering.parts[rank] for rank in self._ranks]
        first = parts[0]
        other = next((rank for rank in self._ranks if parts[rank].call != first.call), None)
        if other is not None:
            gathering.error = MismatchError(f"rank 0 runs {first.call}, but rank {other} {parts[other].call}")
            return
        try:
            MOVES[first.run.name]([part.tensors for part in parts], first.run.root, first.op)
            gathering.ends = self.costs.ends(first.run, first.nbytes, [part.begins for part in parts])
        except Exception as error:  # all others wait for this
            gathering.error = CommError(f"{type(error).__name__}: {error}")

    def split(self, rank: int, groups: Sequence[Sequence[int]]) -> Sequence[Meeting]:
        """Return where the ranks of each group meet; all ranks call it, and the k-th call of each gets the same."""
        with self._changed:
            number = self._num_split[rank]
            self._num_split[rank] += 1
            if number not in self._children:
                self._children[number] = [Meeting(self.costs.among(g), len(g), self._changed) for g in groups]
            return self._children[number]

    # Messages: a port sends one after the other, and receives one after the other --------------

    def send(self, src: int, dst: int, tag: int, nbytes: int, begins: Times) -> Times:
        """Say that a message leaves; return when it arrives, as far as its sender can tell."""
        alpha, takes = self.costs.message(src, dst, nbytes)
        with self._changed:  # a rank may send beside an operation of its own that runs in the background
            self._out[src] = left = np.maximum(begins, self._out[src]) + takes
            self._arrivals[src, dst, tag].append((left, takes, alpha))
        return left + alpha

    def receive(self, src: int, dst: int, tag: int) -> Times:
        """Return when the next message with this tag arrives, which has come; each is asked for once."""
        with self._changed:
            left, takes, alpha = self._arrivals[src, dst, tag].popleft()
            self._into[dst] = served = np.maximum(left, self._into[dst] + takes)
        return served + alpha
