"""What each collective promises, in one table: what a rank has at the start, and what it must have at the end.

Who proves a schedule, simulates it, draws it, measures it or runs it reads this table. A collective is a name in
configurations and in calls (``"all_reduce"``), and is looked up here once; `Run` is one on so many ranks.

Which memory the chunks name is in `minidist.schedule`. Below, *own* is the chunk with the number of the rank, and n is
the world size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

EVERYONE = -1
"""Instead of a rank: the contributions of all ranks, each of them once."""


@dataclass(frozen=True)
class Run:
    """One collective on some ranks.

    Attributes:
        name: of the collective.
        world_size: how many ranks there are.
        root: of a rooted collective; elsewhere it means nothing.

    Raises:
        ValueError: there is no such collective.
    """

    name: str
    world_size: int
    root: int = 0

    def __post_init__(self) -> None:
        if self.name not in COLLECTIVES:
            raise ValueError(f"collective must be one of {', '.join(COLLECTIVES)}, got {self.name!r}")

    @property
    def collective(self) -> Collective:
        """What it promises."""
        return COLLECTIVES[self.name]

    @property
    def arguments(self) -> tuple[int, ...]:
        """What a schedule is called with, behind the rank."""
        return (self.world_size, self.root) if self.collective.is_rooted else (self.world_size,)


Where = Callable[[Run, int, int], bool]
"""Whether something holds for (run, rank, chunk)."""
Start = Callable[[Run, int, int], int | None]
"""For (run, rank, chunk), which chunk of its own the rank has there at the start; None for nothing."""
End = Callable[[Run, int, int], tuple[int, int] | None]
"""For (run, rank, chunk), what has to be there at the end, as (source, chunk): what that rank had in that chunk at the
start, or the combination of what all had if the source is EVERYONE; None for anything."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What a collective promises, and what it costs at the least.

    Attributes:
        name: as users write it, and as the method of `Communicator` is called.
        root: what the root is, which a rooted collective takes: where the data come from, or where they go to.
        chunks, chunks_per_rank: how many chunks there are unless the schedule says otherwise: so many, and so many
            more for each rank.
        is_cut: whether the schedule may cut its tensor into as many chunks as it likes, whose sizes may then differ by
            one element; where not, chunks are equal blocks, n of them in the larger tensor.
        has_scratch: whether the schedule may ask for further chunks, which belong to nobody.
        has_tensor: whether it moves anything; a barrier moves tokens.
        exists: which chunks a rank has.
        is_input: which chunks are the caller's input, which stays as it is.
        starts: what the chunks hold at the start.
        ends: what they have to hold at the end.
        bus_factor: by n, from bytes over time to the bandwidth that the wires carry; the bytes are those of the larger
            tensor.
        least_sent: by n, what all ranks together have to send at least, in parts of the larger tensor.
    """

    name: str
    root: Literal["source", "destination"] | None = None
    chunks: int = 0
    chunks_per_rank: int = 0
    is_cut: bool = False
    has_scratch: bool = False
    has_tensor: bool = True
    exists: Where
    is_input: Where
    starts: Start
    ends: End
    bus_factor: Callable[[int], float]
    least_sent: Callable[[int], float]

    @property
    def is_rooted(self) -> bool:
        """Whether it takes a root."""
        return self.root is not None


def _everywhere(run: Run, rank: int, chunk: int) -> bool:
    return True


def _nowhere(run: Run, rank: int, chunk: int) -> bool:
    return False


def _at_root(run: Run, rank: int, chunk: int) -> bool:
    return rank == run.root


def _not_at_root(run: Run, rank: int, chunk: int) -> bool:
    return rank != run.root


def _own_or_at_root(run: Run, rank: int, chunk: int) -> bool:
    return rank in (run.root, chunk)


def _all_filled(run: Run, rank: int, chunk: int) -> int | None:
    return chunk


def _own_filled(run: Run, rank: int, chunk: int) -> int | None:
    return chunk if rank == chunk else None


def _root_filled(run: Run, rank: int, chunk: int) -> int | None:
    return chunk if rank == run.root else None


def _exchange_filled(run: Run, rank: int, chunk: int) -> int | None:
    """The input, and the own block of the output, which is copied."""
    if chunk < run.world_size:
        return chunk
    return rank if chunk == run.world_size + rank else None


def _exchanged(run: Run, rank: int, chunk: int) -> tuple[int, int] | None:
    source = chunk - run.world_size
    return (source, rank) if 0 <= source < run.world_size else None


def _block(world_size: int) -> float:
    """All blocks but the own one, of n."""
    return (world_size - 1) / world_size


_ALL = (
    Collective(
        name="all_reduce",
        chunks_per_rank=1,
        is_cut=True,
        exists=_everywhere,
        is_input=_nowhere,
        starts=_all_filled,
        ends=lambda run, rank, chunk: (EVERYONE, chunk),
        bus_factor=lambda n: 2 * (n - 1) / n,  # each rank sends a part of its values away, and gets a sum of all back
        least_sent=lambda n: 2 * (n - 1),
    ),
    Collective(
        name="reduce",
        root="destination",
        chunks=1,
        is_cut=True,
        exists=_everywhere,
        is_input=_nowhere,
        starts=_all_filled,
        ends=lambda run, rank, chunk: (EVERYONE, chunk) if rank == run.root else None,
        bus_factor=lambda n: 1.0,
        least_sent=lambda n: n - 1,
    ),
    Collective(
        name="broadcast",
        root="source",
        chunks=1,
        is_cut=True,
        exists=_everywhere,
        is_input=_nowhere,
        starts=_root_filled,
        ends=lambda run, rank, chunk: (run.root, chunk),
        bus_factor=lambda n: 1.0,
        least_sent=lambda n: n - 1,
    ),
    Collective(
        name="gather",
        root="destination",
        chunks_per_rank=1,
        exists=_own_or_at_root,
        is_input=_not_at_root,
        starts=_own_filled,
        ends=lambda run, rank, chunk: (chunk, chunk) if rank == run.root else None,
        bus_factor=_block,
        least_sent=_block,
    ),
    Collective(
        name="scatter",
        root="source",
        chunks_per_rank=1,
        exists=_own_or_at_root,
        is_input=_at_root,
        starts=_root_filled,
        ends=lambda run, rank, chunk: (run.root, chunk) if rank == chunk else None,
        bus_factor=_block,
        least_sent=_block,
    ),
    Collective(
        name="all_gather",
        chunks_per_rank=1,
        exists=_everywhere,
        is_input=_nowhere,
        starts=_own_filled,
        ends=lambda run, rank, chunk: (chunk, chunk),
        bus_factor=_block,
        least_sent=lambda n: n - 1,
    ),
    Collective(
        name="reduce_scatter",
        chunks_per_rank=1,
        exists=_everywhere,
        is_input=_nowhere,  # the chunks are those of a copy of it
        starts=_all_filled,
        ends=lambda run, rank, chunk: (EVERYONE, chunk) if rank == chunk else None,
        bus_factor=_block,
        least_sent=lambda n: n - 1,
    ),
    Collective(
        name="all_to_all",
        chunks_per_rank=2,  # the blocks of the input, then those of the output
        has_scratch=True,
        exists=_everywhere,
        is_input=lambda run, rank, chunk: chunk < run.world_size,
        starts=_exchange_filled,
        ends=_exchanged,
        bus_factor=_block,
        least_sent=lambda n: n - 1,
    ),
    Collective(
        name="barrier",
        chunks=2,  # a token to send, and one to receive
        has_tensor=False,
        exists=_everywhere,
        is_input=_nowhere,
        starts=_all_filled,
        ends=lambda run, rank, chunk: (EVERYONE, 0),
        bus_factor=lambda n: 0.0,
        least_sent=lambda n: 0.0,
    ),
)
COLLECTIVES = {collective.name: collective for collective in _ALL}
"""All collectives by name."""
