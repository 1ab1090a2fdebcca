"""The two levels of a hierarchy: which ranks share a host, and a communicator of some of them that speaks of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backends.deadline import Deadline
from minidist.communicator import Communicator, Work
from minidist.contract.inner import Inner
from minidist.errors import CommError, PeerLostError

SMALL_BYTES = 2**14
"""What one lane all-reduces alone, as steps inside of a host cost more than its card."""


class Placement:
    """Which rank is on which host.

    Rows of all ranks also come *padded*: as many of each host as the largest one has ranks, so that hosts of different
    sizes exchange blocks of one size.

    Args:
        hosts: what tells hosts apart, of every rank.
        rank: this one.

    Attributes:
        ranks_of: the ranks of each host.
        host, local: the number of this rank's host, and its own number there.
        num_lanes: how many ranks the smallest host has.
        width: how many the largest one has.
    """

    def __init__(self, hosts: Sequence[str], rank: int) -> None:
        names = list(dict.fromkeys(hosts))
        self.ranks_of = [[other for other, name in enumerate(hosts) if name == host] for host in names]
        self._places = [(names.index(name), hosts[:other].count(name)) for other, name in enumerate(hosts)]
        self.host, self.local = self._places[rank]
        self.num_lanes = min(map(len, self.ranks_of))
        self.width = max(map(len, self.ranks_of))

    @property
    def here(self) -> list[int]:
        """The ranks of this host."""
        return self.ranks_of[self.host]

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.local == 0

    @property
    def fits(self) -> bool:
        """Whether this host has no rank without a lane."""
        return len(self.here) == self.num_lanes

    @property
    def is_even(self) -> bool:
        """Whether no host has."""
        return self.width == self.num_lanes

    @property
    def has_levels(self) -> bool:
        """Whether there are several hosts, and several ranks on one of them."""
        return len(self.ranks_of) > 1 and self.width > 1

    def of(self, rank: int) -> tuple[int, int]:
        """Return the host of a rank, and the number of the rank there."""
        return self._places[rank]

    @cached_property
    def slots(self) -> Tensor:
        """The padded row of every rank."""
        return torch.tensor([host * self.width + local for host, local in self._places], device="cpu")

    @cached_property
    def by_lane(self) -> Tensor:
        """All ranks, lane by lane, where hosts are even."""
        return torch.tensor(self.ranks_of, device="cpu").t().reshape(-1)


class Piece:
    """A part of a tensor on its way through the levels.

    Attributes:
        flat: all of it, in one dimension.
        shared: the blocks of the lanes, one behind the other; nothing of a small tensor, which one lane takes alone.
        rest: what lies behind them, which the last lane takes too.
        shards: what each lane takes.
    """

    def __init__(self, flat: Tensor, where: Placement) -> None:
        lanes = where.num_lanes
        block = 0 if flat.nbytes <= SMALL_BYTES else flat.numel() // lanes
        self.flat = flat
        self.shared, self.rest = flat[: lanes * block], flat[lanes * block :]
        self.shards = [flat[lane * block : (lane + 1) * block if lane < lanes - 1 else None] for lane in range(lanes)]
        self._local, self._block = where.local, block

    @property
    def shard(self) -> Tensor:
        """What the lane of this rank takes, which has one."""
        return self.shards[self._local]

    @property
    def block(self) -> Tensor:
        """That, without the rest."""
        return self.shard[: self._block]


@dataclass(frozen=True)
class Level:
    """A communicator of some ranks, whose errors name them by their numbers among all.

    Attributes:
        comm: the communicator.
        ranks: its ranks.
    """

    comm: Communicator
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        self.comm.recorder.explains = False  # whoever has both levels knows of all ranks

    def run(self, operation: str, *args: Any, deadline: Deadline) -> None:
        """Run an operation of the communicator, by its name."""
        with self._named():
            getattr(self.comm, operation)(*args, timeout_s=deadline.left_s)

    def start(self, operation: str, *args: Any, deadline: Deadline) -> Work:
        """Start a collective by its name, to be waited for by `finish`."""
        with self._named():
            work: Work = getattr(self.comm, operation)(*args, timeout_s=deadline.left_s)
        return work

    def finish(self, work: Work) -> None:
        """Wait for what was started."""
        with self._named():
            work.wait()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Raise an error of the communicator as one that names ranks by their numbers among all."""
        try:
            yield
        except PeerLostError as error:
            raise self._lost(error) from error
        except CommError as error:
            raise type(error)(self._among(error)) from error

    def _lost(self, error: PeerLostError) -> PeerLostError:
        for peer, why in Inner(self.comm).gone().items():
            return PeerLostError(f"rank {self.ranks[peer]} is gone: {why}", (self.ranks[peer],))
        return PeerLostError(self._among(error))  # a rank of another group, of a split that borrows its parent

    def _among(self, error: CommError) -> str:
        return f"among ranks {', '.join(map(str, self.ranks))}, there numbered from 0: {error}"
